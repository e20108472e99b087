"""Small folders of pictures whose classes are easy to tell apart."""

import zipfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("daisy", "fern", "moss")


def picture(label: int, seed: int, size: int = 16) -> Image.Image:
    """Noise around a colour and stripes of the class; `seed` makes it another one."""
    noise = np.random.default_rng([label, seed]).normal(0, 20, (size, size, 3))
    stripes = 30 * np.sin(np.arange(size) * (label + 1))[None, :, None]
    colour = np.full(3, 60.0)
    colour[label % 3] = 200 - 40 * (label // 3)
    return Image.fromarray(np.clip(colour + stripes + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file."""
    output = BytesIO()
    image.save(output, kind, **options)
    return output.getvalue()


def write_pictures(
    folder: Path,
    per_class: int | Mapping[str, int] = 10,
    classes: Sequence[str] = CLASSES,
    size: int = 16,
) -> Path:
    """Write `Class/number.jpg` and `.png`, or `split/Class/...` where per_class names splits."""
    splits = {"": per_class} if isinstance(per_class, int) else per_class
    for place, (split, count) in enumerate(splits.items()):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                image = picture(label, 1000 * place + index, size)
                kind, suffix = ("JPEG", "jpg") if index % 2 else ("PNG", "png")
                file = folder / split / name / f"{index:03}.{suffix}"
                file.write_bytes(encoded(image, kind))
    return folder


def write_zip(folder: Path, file: Path, prefix: str = "") -> Path:
    """All files under a folder as a zip."""
    with zipfile.ZipFile(file, "w") as archive:
        for member in sorted(folder.rglob("*")):
            if member.is_file():
                archive.write(member, prefix + member.relative_to(folder).as_posix())
    return file
