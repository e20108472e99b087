"""One image file as RGB pixels of one size. Hostile bytes become an error with a reason."""

import threading
from contextlib import nullcontext
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

PIXEL_LIMIT = 2**26
"""Larger images are not decoded: their pixels would fill the memory (decompression bombs).

One at the limit takes about 8 bytes a pixel, 0.5 GB, and beyond LARGE_PIXELS one is decoded at a
time, however many threads there are.
"""
LARGE_PIXELS, STRIP_PIXELS = 2**23, 2**20
"""Of images that wait for each other, and of what is converted to RGB at once."""
_ONE_LARGE_IMAGE = threading.Lock()


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
            large = picture.width * picture.height > LARGE_PIXELS
            with _ONE_LARGE_IMAGE if large else nullcontext():
                return _pixels(picture, size)
    except ImagesError:
        raise
    except UnidentifiedImageError as error:
        raise ImagesError(f"not an image of a known kind ({', '.join(FORMATS)})") from error
    except Exception as error:  # Decoders raise errors of every kind on damaged or hostile files.
        raise ImagesError(f"damaged: {error or type(error).__name__}") from error


def _pixels(picture: Image.Image, size: int) -> np.ndarray:
    # A large JPEG is decoded at a half, quarter or eighth, never below twice what we need.
    picture.draft(None, (2 * size, 2 * size))
    ImageOps.exif_transpose(picture, in_place=True)
    square = _centre_square(picture)
    if square.width != size:
        square = square.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(square.convert("RGB")).transpose(2, 0, 1))


def _centre_square(picture: Image.Image) -> Image.Image:
    """In RGB or grey, converted in strips, so that no second copy of all pixels is made."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    rows = max(1, STRIP_PIXELS // side)
    if rows >= side:
        return _to_rgb(picture.crop((left, top, left + side, top + side)))
    square = Image.new("L" if picture.mode.startswith("I;16") else "RGB", (side, side))
    for start in range(0, side, rows):
        end = min(start + rows, side)
        strip = picture.crop((left, top + start, left + side, top + end))
        square.paste(_to_rgb(strip), (0, start))
    return square


def _to_rgb(picture: Image.Image) -> Image.Image:
    """RGB, or one channel of grey."""
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, and nearly every pixel would be white.
        return Image.fromarray(np.round(np.asarray(picture) / 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ImagesError("32 bits a pixel, so that white is unknown; save it with 8 or 16")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")
