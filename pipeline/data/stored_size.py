"""The pixels of an image in the size in which they are stored. Reading its file is in
``pipeline.data.images``.
"""

import math

import numpy as np
from PIL import Image

from pipeline.recipe.schema import DataRecipe

# stored shorter side / image size, for images that are cropped when they are loaded
STORED_MARGIN = 256 / 224
# the longer side of such an image is centre-cropped to this multiple of the shorter one
MAX_ASPECT = 2


def fit(image: Image.Image, data: DataRecipe, fixed_size: bool) -> np.ndarray:
    """Pixels (H, W, 3) uint8 as they are stored: the square that the model sees if ``fixed_size``;
    else never enlarged, and

    with ``data.max_resolution`` the longer side brought down to it, without it the shorter side to
    ``stored_side`` and the longer one centre-cropped to MAX_ASPECT times that.
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
    """Upper bound of the shorter side of stored images whose size varies, where the recipe sets no
    ``max_resolution``.
    """
    return math.ceil(image_size * STORED_MARGIN)


def largest_bytes(data: DataRecipe, fixed_size: bool) -> int:
    """Bytes of the pixels of the largest image that ``fit`` returns."""
    if fixed_size:
        return 3 * data.image_size**2
    if data.max_resolution is not None:
        return 3 * data.max_resolution**2
    return 3 * MAX_ASPECT * stored_side(data.image_size) ** 2


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return (
        image
        if image.size == (width, height)
        else image.resize((width, height), Image.Resampling.BICUBIC)
    )


def _crop(image: Image.Image) -> Image.Image:
    width, height = image.size
    crop_width, crop_height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    cropped = (left, top, left + crop_width, top + crop_height)
    return image if cropped == (0, 0, width, height) else image.crop(cropped)
