"""Images as a model is shown them: their files read, and the sides at which it sees them. Needs no
FFCV.

What cannot be converted raises an error that says why; nothing here waits: not for a pipe, nor for
a programme that a format might call.
"""

import os
import stat
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow's decoders that call nothing outside
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_FILE_BYTES = 1 << 29
# side of the evaluation crop / shorter side of the stored image
CENTRE_SHARE = 224 / 256


class BrokenImage(ValueError):
    """An image that cannot be decoded or shown: says why."""


def is_image(name: str) -> bool:
    """Whether a file's name ends like that of an image. Hidden files are none: some systems leave
    ``._x.png`` behind.
    """
    base = name.rpartition("/")[2]
    return (
        not base.startswith(".")
        and Image.registered_extensions().get(os.path.splitext(base)[1].lower()) in FORMATS
    )


def read_file(path: str | Path, offset: int = 0, length: int | None = None) -> bytes:
    """A regular file's content, or the ``length`` bytes of it from ``offset`` on.

    Raises:
        OSError: there is none, it is something else, such as a pipe, it is shorter, or it is
            implausibly large.
    """
    # opening a pipe would wait
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

    Greyscale, palettes and CMYK are converted, 16-bit values scaled to 8 bits, transparency is
    dropped.

    Raises:
        BrokenImage: damaged, empty, floating-point, or above Pillow's limit of 89 million pixels.
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
        # Pillow's decoders raise errors of many kinds on damaged bytes
        raise BrokenImage(" ".join(str(error).split()) or type(error).__name__) from error
    return to_rgb(image)


def _load(content: bytes) -> Image.Image:
    """All that Pillow does with an image's bytes."""
    with warnings.catch_warnings():
        # damaged EXIF data, for example
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as 8-bit RGB. Raises BrokenImage: values are floating-point, of
    unknown range.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise BrokenImage("has floating-point values; convert it to 8 or 16 bits")
    # convert() would clip 16-bit values at 255
    if image.mode.startswith("I"):
        image = Image.fromarray(np.clip(np.round(np.asarray(image) / 257), 0, 255).astype(np.uint8))
    return image.convert("RGB")
