"""Image files read and decoded to RGB; FFCV is not needed.

An image that cannot be converted raises an error that says why. Nothing here can block: neither on
a pipe, nor on a program that a file format might call.
"""

import os
import stat
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that Pillow decodes without calling other programs."""
MAX_FILE_BYTES = 1 << 29
"""Bytes of the largest image file that is read."""
CENTRE_SHARE = 224 / 256
"""Side of the evaluation crop / shorter side of the stored image."""


class BrokenImage(ValueError):  # noqa: N818  the name is public
    """An image that cannot be decoded or shown; the message says why."""


def is_image(name: str) -> bool:
    """Return whether a file's name has the ending of an image.

    Hidden files do not count, as some systems leave files such as ``._x.png`` behind.
    """
    base = name.rpartition("/")[2]
    return (
        not base.startswith(".")
        and Image.registered_extensions().get(os.path.splitext(base)[1].lower()) in FORMATS
    )


def read_file(path: str | Path, offset: int = 0, length: int | None = None) -> bytes:
    """Read a regular file, or ``length`` bytes of it from ``offset`` on.

    Raises:
        OSError: there is no such file, it is not a regular one, it is too short, or it is
            implausibly large.
    """
    # O_NONBLOCK, because opening a pipe would wait for its other end.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError("is not a regular file")
        wanted = found.st_size if length is None else length
        if wanted > MAX_FILE_BYTES:
            raise OSError(
                f"has {wanted} bytes, more than the {MAX_FILE_BYTES} that an image may have"
            )
        content = os.pread(file.fileno(), wanted, offset)
        if len(content) < wanted:
            raise OSError("has become shorter")
        return content


def decode(content: bytes) -> Image.Image:
    """Decode the first frame to 8-bit RGB, upright as its EXIF orientation says.

    Greyscale, palettes and CMYK are converted, 16-bit values are scaled to 8 bits, and transparency
    is dropped.

    Raises:
        BrokenImage: the image is damaged, empty, floating-point, or above Pillow's limit of 89
            million pixels.
    """
    if not content:
        raise BrokenImage("is empty")
    try:
        image = _load(content)
    except UnidentifiedImageError:
        raise BrokenImage(
            f"is not an image, or not in one of the formats {', '.join(FORMATS)}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders raise errors of many kinds on damaged bytes.
        raise BrokenImage(" ".join(str(error).split()) or type(error).__name__) from error
    return to_rgb(image)


def _load(content: bytes) -> Image.Image:
    """Load the first frame with Pillow, and turn it upright."""
    with warnings.catch_warnings():
        # Warnings about damaged EXIF data, for example, are of no use to anybody.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image of any mode to 8-bit RGB.

    Raises:
        BrokenImage: its values are floating-point, so their range is unknown.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise BrokenImage("has floating-point values; convert it to 8 or 16 bits")
    # convert() would clip 16-bit values at 255.
    if image.mode.startswith("I"):
        image = Image.fromarray(np.clip(np.round(np.asarray(image) / 257), 0, 255).astype(np.uint8))
    return image.convert("RGB")
