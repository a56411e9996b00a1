"""The bytes of an image file -> upright 8-bit RGB, in the size in which it is stored.

What cannot be converted raises an error that says why; nothing here waits: not for a pipe, nor for a programme that a format might call.
"""

import math
import os
import stat
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.recipe import DataRecipe

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's decoders that call nothing outside
MAX_FILE_BYTES = 1 << 29
STORED_MARGIN = 256 / 224  # stored shorter side / image size, for images that are cropped when they are loaded
MAX_ASPECT = 2  # the longer side of such an image is centre-cropped to this multiple of the shorter one


def is_image(name: str) -> bool:
    """Whether a file's name ends like that of an image. Hidden files are none: some systems leave ``._x.png`` behind."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and Image.registered_extensions().get(os.path.splitext(base)[1].lower()) in FORMATS


def read_file(path: str | Path, offset: int = 0, length: int | None = None) -> bytes:
    """A regular file's content, or the ``length`` bytes of it from ``offset`` on.

    Raises:
        OSError: there is none, it is something else, such as a pipe, it is shorter, or it is implausibly large.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # opening a pipe would wait
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError("is not a regular file")
        wanted = found.st_size if length is None else length
        if wanted > MAX_FILE_BYTES:
            raise OSError(f"has {wanted} bytes, more than the {MAX_FILE_BYTES} that an image may have")
        content = os.pread(file.fileno(), wanted, offset)
        if len(content) < wanted:
            raise OSError("has become shorter")
        return content


def decode(content: bytes) -> Image.Image:
    """Decode the first frame to 8-bit RGB, upright as its EXIF orientation says.

    Greyscale, palettes and CMYK are converted, 16-bit values scaled to 8 bits, transparency is dropped.

    Raises:
        Exception: of many kinds, as Pillow's decoders do: broken, empty, floating-point, or above Pillow's limit of 89 million pixels.
    """
    if not content:
        raise ValueError("is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF data, for example
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"is no image, or none of the formats {', '.join(FORMATS)}") from None
        with image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as 8-bit RGB. Raises ValueError: floating-point values, whose range nobody knows."""
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("has floating-point values; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # convert() would clip 16-bit values at 255
        image = Image.fromarray(np.clip(np.round(np.asarray(image) / 257), 0, 255).astype(np.uint8))
    return image.convert("RGB")


def fit(image: Image.Image, data: DataRecipe, fixed_size: bool) -> np.ndarray:
    """Pixels (H, W, 3) uint8 as they are stored: the square that the model sees if ``fixed_size``; else never enlarged, and

    with ``data.max_resolution`` the longer side brought down to it, without it the shorter side to ``stored_side`` and the longer one
    centre-cropped to MAX_ASPECT times that.
    """
    if fixed_size:
        return np.asarray(_resize(image, data.image_size, data.image_size))
    if data.max_resolution is None:
        image = _crop(image)
        scale = stored_side(data.image_size) / min(image.size)
    else:
        scale = data.max_resolution / max(image.size)
    if scale < 1:
        width, height = (max(round(side * scale), 1) for side in image.size)
        image = _resize(image, width, height)
    return np.asarray(image)


def stored_side(image_size: int) -> int:
    """Upper bound of the shorter side of stored images whose size varies, where the recipe sets no ``max_resolution``."""
    return math.ceil(image_size * STORED_MARGIN)


def largest_bytes(data: DataRecipe, fixed_size: bool) -> int:
    """Bytes of the pixels of the largest image that ``fit`` returns."""
    if fixed_size:
        return 3 * data.image_size**2
    if data.max_resolution is not None:
        return 3 * data.max_resolution**2
    return 3 * MAX_ASPECT * stored_side(data.image_size) ** 2


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def _crop(image: Image.Image) -> Image.Image:
    width, height = image.size
    crop_width, crop_height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    cropped = (left, top, left + crop_width, top + crop_height)
    return image if cropped == (0, 0, width, height) else image.crop(cropped)
