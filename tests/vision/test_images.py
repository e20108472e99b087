"""Data sets of images: layouts, splits, broken files, the cache."""

import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vision.pictures import CLASSES, encoded, picture, write_pictures, write_zip

from graftkit.errors import ConfigError, ImagesError, OutputError
from graftkit.vision import images as images_module
from graftkit.vision.images import SPLITS, ImageSet, decode_image, open_images, split_images

SIZE = 16
GIVEN = {"train": 4, "val": 2, "test": 2}


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., ImageSet]:
    """Opens data with a cache of the test's own."""
    return lambda path, size=SIZE, **more: open_images(path, size, tmp_path / "cache", **more)


def files_of(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*") if file.is_file())


# Layouts


def test_a_folder_of_classes_is_split_in_every_class(tmp_path: Path, opened: Callable) -> None:
    images = opened(write_pictures(tmp_path / "data", 20))
    assert images.classes == CLASSES
    assert images.pixels.shape == (60, 3, SIZE, SIZE)
    assert images.pixels.dtype == np.uint8
    assert images.labels.dtype == np.int64
    assert images.splits.dtype == np.int8
    for label in range(3):
        assert np.bincount(images.splits[images.labels == label]).tolist() == [14, 3, 3]


def test_parts_are_the_images_of_a_split(tmp_path: Path, opened: Callable) -> None:
    images = opened(write_pictures(tmp_path / "data", GIVEN))
    for split in SPLITS:
        part = images.subset(split)
        assert [name.split("/")[0] for name in part.names] == [split] * len(part.labels)
        assert len(part.names) == len(part.pixels) == 3 * GIVEN[split]
    index = images.names.index("test/fern/000.png")
    expected = np.asarray(picture(1, 2000, SIZE)).transpose(2, 0, 1)
    assert np.array_equal(images.pixels[index], expected)
    assert images.classes[images.labels[index]] == "fern"


@pytest.mark.parametrize("prefix", ["", "flowers/v2/", "../../"])
def test_a_zip_holds_what_its_folder_holds(prefix: str, tmp_path: Path, opened: Callable) -> None:
    folder = write_pictures(tmp_path / "data", GIVEN)
    zipped = opened(write_zip(folder, tmp_path / "data.zip", prefix))
    loose = opened(folder)
    assert np.array_equal(zipped.pixels, loose.pixels)
    assert np.array_equal(zipped.labels, loose.labels)
    assert np.array_equal(zipped.splits, loose.splits)
    assert not any(".." in name for name in zipped.names)
    assert zipped.digest == loose.digest or prefix == "flowers/v2/"


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_validation_goes_by_several_names(val: str, tmp_path: Path, opened: Callable) -> None:
    images = opened(write_pictures(tmp_path / "data", {"train": 2, val: 3, "test": 1}))
    assert np.bincount(images.splits).tolist() == [6, 9, 3]


def test_hidden_files_and_those_of_a_mac_are_no_images(tmp_path: Path, opened: Callable) -> None:
    folder = write_pictures(tmp_path / "data", 4)
    (folder / "fern/._000.png").write_bytes(b"mac")
    (folder / "__MACOSX/fern").mkdir(parents=True)
    (folder / "__MACOSX/fern/x.png").write_bytes(b"mac")
    for data in (folder, write_zip(folder, tmp_path / "data.zip")):
        images = opened(data)
        assert (len(images.names), images.skipped, images.warnings) == (12, (), ())


def test_files_of_other_kinds_are_left_out_with_a_warning(tmp_path: Path, opened: Callable) -> None:
    folder = write_pictures(tmp_path / "data", 4)
    (folder / "README.txt").write_text("flowers")
    (folder / "lost.png").write_bytes(encoded(picture(0, 0)))
    images = opened(folder)
    assert "README.txt" in images.warnings[0]
    assert [(skip.name, skip.reason) for skip in images.skipped] == [
        ("lost.png", "lies in no class folder")
    ]


def test_links_to_folders_are_followed_once(tmp_path: Path, opened: Callable) -> None:
    elsewhere = write_pictures(tmp_path / "elsewhere", 3)
    data = tmp_path / "data"
    data.mkdir()
    for name in CLASSES:
        (data / name).symlink_to(elsewhere / name)
    (elsewhere / "fern/round").symlink_to(elsewhere)
    assert len(opened(data).names) == 9


# CSV


def write_csv(file: Path, rows: list[str], header: str = "file,class,split") -> Path:
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return file


def rows_of(folder: Path) -> list[str]:
    rows = []
    for file in sorted(folder.rglob("*.*g")):
        split, name, _ = file.relative_to(folder).parts
        rows.append(f"{file.relative_to(folder).as_posix()},{name},{split}")
    return rows


def test_a_csv_names_files_in_its_folder_or_in_the_only_zip_beside_it(
    tmp_path: Path, opened: Callable
) -> None:
    folder = write_pictures(tmp_path / "data", GIVEN)
    rows = rows_of(folder)
    loose = opened(write_csv(folder / "labels.csv", rows))
    (tmp_path / "zipped").mkdir()
    write_zip(folder, tmp_path / "zipped/data.zip")
    zipped = opened(write_csv(tmp_path / "zipped/labels.csv", rows, "\ufeffFile,LABEL , split"))
    assert len(loose.names) == 24
    assert loose.digest == zipped.digest


def test_a_csv_without_splits_is_split_here(tmp_path: Path, opened: Callable) -> None:
    folder = write_pictures(tmp_path / "data", {"all": 6})
    rows = [row.rpartition(",")[0] for row in rows_of(folder)]
    images = opened(write_csv(folder / "x.csv", rows, "file,class"))
    assert np.bincount(images.splits).tolist() == [12, 3, 3]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("name,class", ["a.png,fern"], "no column 'file'"),
        ("file,kind", ["a.png,fern"], r"no column 'class' \(or 'label'\)"),
        ("file,class", [], "no column"),
        ("file,class", ["train/fern/000.png,fern", "a.png,fern", "b.png,moss"], "a.png.*2 of 3"),
        ("file,class", ["train/fern/000.png,fern"] * 2, "more than once"),
        ("file,class", ["train/fern/000.png,"], "row 2 lacks class"),
        ("file,class", [",fern"], "row 2 lacks a file"),
        ("file,class,split", ["train/fern/000.png,fern,dev"], "split 'dev' is unknown"),
        ("file,class,split", ["train/fern/000.png,fern"], "split '' is unknown"),
        ("file,class", ["train/fern/000.png,fern", "\x00,moss"], r"x00.* is not in"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused(
    header: str, rows: list[str], message: str, tmp_path: Path, opened: Callable
) -> None:
    folder = write_pictures(tmp_path / "data", {"train": 1})
    with pytest.raises(ImagesError, match=message):
        opened(write_csv(folder / "labels.csv", rows, header))


def test_a_csv_of_bytes_that_are_no_text_is_refused(tmp_path: Path, opened: Callable) -> None:
    (tmp_path / "x.csv").write_bytes(b"file,class\n\xff\xfe,a\n")
    with pytest.raises(ImagesError, match="UTF-8"):
        opened(tmp_path / "x.csv")


# Data that cannot be used


def test_a_path_that_holds_no_data_is_refused(tmp_path: Path, opened: Callable) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("not a zip")
    damaged = write_zip(write_pictures(tmp_path / "data", 3), tmp_path / "damaged.zip")
    damaged.write_bytes(damaged.read_bytes()[:-30])
    for name, message in (
        ("empty", "no images in class folders"),
        ("absent", "no such folder or file"),
        ("text.zip", "neither a folder, nor a zip"),
        ("damaged.zip", "neither a folder, nor a zip"),
    ):
        with pytest.raises(ImagesError, match=message):
            opened(tmp_path / name)
    assert not (tmp_path / "cache").exists()


def test_a_class_too_small_to_split_is_named_with_its_count(
    tmp_path: Path, opened: Callable
) -> None:
    folder = write_pictures(tmp_path / "data", 4)
    for index in (1, 2):
        (folder / f"moss/00{index}.{'jpg' if index == 1 else 'png'}").unlink()
    with pytest.raises(ImagesError, match="'moss' has 2 different images"):
        opened(folder)


def test_copies_of_one_image_do_not_make_a_class_large_enough(
    tmp_path: Path, opened: Callable
) -> None:
    folder = write_pictures(tmp_path / "data", 3)
    for file in (folder / "moss").iterdir():
        file.write_bytes(encoded(picture(2, 0)))
    with pytest.raises(ImagesError, match="'moss' has 1 different image;"):
        opened(folder)


@pytest.mark.parametrize(
    ("per_class", "classes", "message"),
    [
        (4, ("moss",), "one class only, 'moss'"),
        ({"train": 2, "dev": 2}, CLASSES, "folder 'dev' is no split"),
        ({"train": 2, "val": 2}, CLASSES, "no images for test"),
        ({"test": 2, "val": 2}, CLASSES, "'daisy' has no training images"),
    ],
)
def test_a_data_set_without_a_needed_part_is_refused(
    per_class: int, classes: tuple[str, ...], message: str, tmp_path: Path, opened: Callable
) -> None:
    with pytest.raises(ImagesError, match=message):
        opened(write_pictures(tmp_path / "data", per_class, classes))


def test_a_class_missing_from_validation_is_a_warning(tmp_path: Path, opened: Callable) -> None:
    folder = write_pictures(tmp_path / "data", GIVEN)
    for file in (folder / "val/moss").iterdir():
        file.unlink()
    images = opened(folder)
    assert images.warnings == ("No validation images of moss: validation says nothing of it.",)


def test_equal_files_in_two_splits_or_classes_are_a_warning(
    tmp_path: Path, opened: Callable
) -> None:
    folder = write_pictures(tmp_path / "data", GIVEN)
    (folder / "test/moss/000.png").write_bytes((folder / "train/fern/000.png").read_bytes())
    assert opened(folder).warnings == (
        "Images that are, byte for byte, in more than one split: 1.",
        "Images that are, byte for byte, in more than one class: 1.",
    )


def test_sizes_and_seeds_that_mean_nothing_are_refused(tmp_path: Path, opened: Callable) -> None:
    folder = write_pictures(tmp_path / "data", 3)
    for size, seed in ((0, 0), (16, -1)):
        with pytest.raises(ConfigError, match="at least"):
            opened(folder, size, seed=seed)


# Splits


@given(
    counts=st.lists(st.integers(3, 40), min_size=2, max_size=4),
    seed=st.integers(0, 99),
    copies=st.integers(0, 5),
)
def test_splits_are_stratified_and_keep_copies_together(
    counts: list[int], seed: int, copies: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    contents = [str(index) for index in range(len(labels))]
    labels = np.concatenate([labels, labels[:copies]])
    contents += contents[:copies]
    names = [str(count) for count in counts]
    splits = split_images(labels, contents, names, seed)
    assert np.array_equal(splits, split_images(labels, contents, names, seed))
    assert np.array_equal(splits[:copies], splits[len(splits) - copies :])
    for label, count in enumerate(counts):
        actual = np.bincount(splits[: sum(counts)][labels[: sum(counts)] == label], minlength=3)
        size = max(1, round(0.15 * count))
        assert actual.tolist() == [count - 2 * size, size, size]


def test_another_seed_gives_another_split_of_the_same_cache(
    tmp_path: Path, opened: Callable
) -> None:
    folder = write_pictures(tmp_path / "data", 20)
    first, second = opened(folder, seed=0), opened(folder, seed=1)
    assert not np.array_equal(first.splits, second.splits)
    assert first.digest != second.digest
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


# Decoding


def grey_16() -> Image.Image:
    return Image.fromarray(np.full((SIZE, SIZE), 257 * 100, np.uint16))


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (SIZE, SIZE), 100), "PNG", (100, 100, 100)),
        (Image.new("1", (SIZE, SIZE), 1), "PNG", (255, 255, 255)),
        (Image.new("RGB", (SIZE, SIZE), (9, 99, 200)).quantize(4), "GIF", (9, 99, 200)),
        (Image.new("RGBA", (SIZE, SIZE), (200, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 51)), "WEBP", (204, 204, 204)),
        (Image.new("LA", (SIZE, SIZE), (0, 51)), "PNG", (204, 204, 204)),
        (Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("CMYK", (SIZE, SIZE), (0, 0, 0, 0)), "JPEG", (255, 255, 255)),
        (grey_16(), "PNG", (100, 100, 100)),
        (grey_16(), "TIFF", (100, 100, 100)),
        (Image.new("RGB", (SIZE, SIZE), (1, 2, 3)), "BMP", (1, 2, 3)),
    ],
)
def test_every_kind_of_image_becomes_rgb(
    image: Image.Image, kind: str, expected: tuple[int, int, int]
) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = decode_image(encoded(image, kind, **options), SIZE)
    assert pixels.shape == (3, SIZE, SIZE)
    assert np.abs(pixels.astype(int) - np.array(expected)[:, None, None]).max() <= 1


def test_a_palette_with_a_transparent_colour_is_laid_over_white() -> None:
    image = Image.new("P", (SIZE, SIZE), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert decode_image(encoded(image, "PNG", transparency=0), SIZE).min() == 255


def test_orientation_of_the_camera_is_applied() -> None:
    upright = picture(0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    actual = decode_image(encoded(turned, "PNG", exif=exif), SIZE)
    assert np.array_equal(actual, np.asarray(upright).transpose(2, 0, 1))


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(content, SIZE)[:, 0, 0].tolist() == [255, 0, 0]


def test_the_centre_of_the_right_size_is_not_resampled() -> None:
    wide = np.random.default_rng(0).integers(0, 256, (SIZE, 2 * SIZE + 1, 3), dtype=np.uint8)
    actual = decode_image(encoded(Image.fromarray(wide)), SIZE)
    assert np.array_equal(actual, wide[:, 8 : 8 + SIZE].transpose(2, 0, 1))


def test_large_images_are_averaged_not_sampled() -> None:
    fine = (np.indices((8 * SIZE, 8 * SIZE)).sum(0) % 2 * 255).astype(np.uint8)
    actual = decode_image(encoded(Image.fromarray(fine)), SIZE)
    assert np.abs(actual.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (5, 7)])
def test_tiny_and_narrow_images_are_scaled_up(shape: tuple[int, int]) -> None:
    actual = decode_image(encoded(Image.new("RGB", shape, (7, 7, 7))), SIZE)
    assert np.array_equal(actual, np.full((3, SIZE, SIZE), 7))


def test_a_large_photograph_is_scaled_as_if_decoded_whole() -> None:
    smooth = picture(1, 3).resize((1024, 768), Image.Resampling.BICUBIC)
    actual = decode_image(encoded(smooth, "JPEG", quality=95), 64)
    direct = smooth.crop((128, 0, 896, 768)).resize((64, 64), Image.Resampling.BILINEAR)
    difference = actual.astype(int) - np.asarray(direct).transpose(2, 0, 1)
    assert np.abs(difference).max() <= 6


def bomb() -> bytes:
    """A PNG of one row that claims to have forty thousand, each as long."""
    content = bytearray(encoded(Image.new("L", (SIZE, 1))))
    content[16:24] = (40_000).to_bytes(4, "big") * 2
    checksum = zipfile.crc32(bytes(content[12:29]))
    content[29:33] = checksum.to_bytes(4, "big")
    return bytes(content)


PHOTOGRAPH = encoded(picture(0, 1, 64), "JPEG")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (b"just text", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (PHOTOGRAPH[: len(PHOTOGRAPH) // 2], "truncated"),
        (encoded(picture(0, 1, 64))[:-2000], "damaged"),
        (bomb(), "damaged|pixels"),
        (encoded(Image.new("F", (SIZE, SIZE)), "TIFF"), "32 bits"),
    ],
)
def test_broken_and_hostile_files_are_errors_with_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(ImagesError, match=reason):
        decode_image(content, SIZE)


def test_more_pixels_than_the_limit_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftkit.vision.images.files.PIXEL_LIMIT", 255)
    with pytest.raises(ImagesError, match="16x16 pixels, more than 255"):
        decode_image(encoded(picture(0, 0)), SIZE)


@given(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"]), st.randoms())
def test_damage_anywhere_is_an_image_or_an_images_error(kind: str, random: object) -> None:
    content = bytearray(encoded(picture(1, 2), kind))
    for _ in range(4):
        content[random.randrange(len(content))] = random.randrange(256)  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, about odd metadata.
        try:
            pixels = decode_image(bytes(content), SIZE)
        except ImagesError:
            return
    assert pixels.shape == (3, SIZE, SIZE)


# Broken files in a data set


def test_a_broken_file_is_skipped_with_its_reason(tmp_path: Path, opened: Callable) -> None:
    folder = write_pictures(tmp_path / "data", 10)
    whole = folder / "fern/001.jpg"
    whole.write_bytes(whole.read_bytes()[:100])
    (folder / "moss/000.png").write_bytes(b"")
    for data in (folder, folder, write_zip(folder, tmp_path / "data.zip")):
        images = opened(data)
        skipped = {skip.name: skip.reason for skip in images.skipped}
        assert list(skipped) == ["fern/001.jpg", "moss/000.png"]
        assert "damaged" in skipped["fern/001.jpg"]
        assert "not an image" in skipped["moss/000.png"]
        assert len(images.names) == len(images.labels) == len(images.pixels) == 28
        assert "fern/001.jpg" not in images.names
        place = images.names.index("fern/002.png")
        assert np.array_equal(images.pixels[place], np.asarray(picture(1, 2)).transpose(2, 0, 1))


def test_more_than_a_tenth_broken_is_refused_and_leaves_nothing(
    tmp_path: Path, opened: Callable
) -> None:
    folder = write_pictures(tmp_path / "data", 10)
    for index in range(4):
        (folder / "fern" / f"broken{index}.jpg").write_bytes(b"broken")
    with pytest.raises(ImagesError, match=r"4 of 34 files .* 'fern/broken0\.jpg'"):
        opened(folder)
    assert files_of(tmp_path / "cache") == []


def test_a_damaged_member_of_a_zip_is_skipped(tmp_path: Path, opened: Callable) -> None:
    file = write_zip(write_pictures(tmp_path / "data", 10), tmp_path / "data.zip")
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo("moss/003.jpg").header_offset
    content[start + 200] ^= 255  # its checksum no longer holds
    file.write_bytes(content)
    images = opened(file)
    assert [skip.name for skip in images.skipped] == ["moss/003.jpg"]
    assert "CRC" in images.skipped[0].reason


def test_a_file_of_too_many_bytes_is_not_read(
    tmp_path: Path, opened: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pictures(tmp_path / "data", 10)
    (folder / "fern/huge.png").write_bytes(b"x" * 5000)
    monkeypatch.setattr("graftkit.vision.images.files.FILE_LIMIT_BYTES", 4000)
    for data in (folder, write_zip(folder, tmp_path / "data.zip")):
        assert opened(data).skipped[0].reason == "5,000 bytes, more than 4,000"


def test_a_pipe_in_a_folder_is_no_image(tmp_path: Path, opened: Callable) -> None:
    folder = write_pictures(tmp_path / "data", 3)
    os.mkfifo(folder / "fern/pipe.png")
    assert len(opened(folder).names) == 9


# The cache


def test_the_second_call_maps_the_cache_without_decoding(
    tmp_path: Path, opened: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pictures(tmp_path / "data", 5)
    steps: list[tuple[str, int, int]] = []
    first = opened(folder, progress=lambda *step: steps.append(step))
    assert steps[-1] == ("reading images", 15, 15)
    monkeypatch.setattr(images_module, "decode_image", None)
    second = opened(folder)
    assert first.digest == second.digest
    assert isinstance(second.pixels, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        second.pixels[0] = 0
    assert len(files_of(tmp_path / "cache")) == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "record", "empty"])
def test_a_damaged_cache_is_made_again(damage: str, tmp_path: Path, opened: Callable) -> None:
    folder = write_pictures(tmp_path / "data", 5)
    before = opened(folder)
    expected = np.array(before.pixels)
    file = next((tmp_path / "cache").glob("*.npy"))
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-10])
    elif damage == "flip":
        content[-1] ^= 255
        file.write_bytes(content)
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.with_suffix(".json").write_text("[]")
    after = opened(folder)
    assert np.array_equal(after.pixels, expected)
    assert after.digest == before.digest


def test_a_changed_file_or_size_is_decoded_anew(tmp_path: Path, opened: Callable) -> None:
    folder = write_pictures(tmp_path / "data", 5)
    before = opened(folder)
    (folder / "fern/000.png").write_bytes(encoded(picture(0, 77)))
    after = opened(folder)
    assert before.digest != after.digest
    assert np.array_equal(after.pixels[5], np.asarray(picture(0, 77)).transpose(2, 0, 1))
    assert opened(folder, 8).pixels.shape == (15, 3, 8, 8)


def test_a_cache_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "data", 3)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cache of images cannot be written"):
        open_images(folder, SIZE, tmp_path / "file")


def test_an_interrupted_decoding_leaves_nothing_behind(tmp_path: Path, opened: Callable) -> None:
    def stop(step: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(write_pictures(tmp_path / "data", 3), progress=stop)
    assert files_of(tmp_path / "cache") == []


def test_the_seedlings_come_with_their_own_splits(shared: Path, opened: Callable) -> None:
    data = shared / "data/vision"
    if not data.is_dir():
        pytest.skip("no vision data")
    from graftkit.vision.images.files import list_images

    listings = [list_images(data / name) for name in ("plant_seedlings_128.zip", "labels.csv")]
    assert listings[0].entries == listings[1].entries
    assert len(listings[0].classes) == 12
    splits = [entry.split for entry in listings[0].entries]
    assert np.bincount(splits).tolist() == [3319, 708, 723]
