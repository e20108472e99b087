"""One image file as RGB pixels of one size. Hostile bytes become an error with a reason."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np

from graftkit.errors import ConfigError, ImagesError

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as error:
    raise ConfigError(
        "images are read with Pillow, which is missing; pip install 'graftkit[vision]'"
    ) from error

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
"""What is tried on a file. Never all that Pillow knows: its reader of EPS starts a program."""

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""How the names of image files end, in lower case."""

PIXEL_LIMIT = 100_000_000
"""Larger images are not decoded: their pixels would fill the memory (decompression bombs)."""


@dataclass(frozen=True)
class Skipped:
    """A file that could not be read as an image, and why."""

    name: str
    reason: str


def decode_image(content: bytes, size: int) -> np.ndarray:
    """RGB pixels of the largest centred square, uint8 (3, size, size).

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is divided by 257. The
    square is scaled with a bilinear filter as wide as the step (antialiased); one of the right size
    stays as it is. Of an animation, the first frame.

    Raises: ImagesError, its message the reason alone.
    """
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as picture:
            if picture.width * picture.height > PIXEL_LIMIT:
                raise ImagesError(
                    f"{picture.width}x{picture.height} pixels, more than {PIXEL_LIMIT:,}"
                )
            # A large JPEG is decoded at a half, quarter or eighth, never below twice what we need.
            picture.draft(None, (2 * size, 2 * size))
            ImageOps.exif_transpose(picture, in_place=True)
            square = _to_rgb(_centre_square(picture))
    except ImagesError:
        raise
    except UnidentifiedImageError as error:
        raise ImagesError(f"not an image of a known kind ({', '.join(FORMATS)})") from error
    except Exception as error:  # Decoders raise errors of every kind on damaged or hostile files.
        raise ImagesError(f"damaged: {error or type(error).__name__}") from error
    if square.width != size:
        square = square.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _centre_square(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, and nearly every pixel would be white.
        grey = np.round(np.asarray(picture) / 257).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ImagesError("32 bits a pixel, so that white is unknown; save it with 8 or 16")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")
