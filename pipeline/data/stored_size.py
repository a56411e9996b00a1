"""The size in which images are stored."""

import math

import numpy as np
from PIL import Image

from pipeline.recipe.schema import DataRecipe

STORED_MARGIN = 256 / 224
"""Stored shorter side / image size, for images that are cropped when they are loaded."""
MAX_ASPECT = 2
"""Largest longer side / shorter side of such an image; the longer one is centre-cropped."""


def fit(image: Image.Image, data: DataRecipe, fixed_size: bool) -> np.ndarray:
    """Bring an image to the size in which it is stored.

    With ``fixed_size`` that is the square that the model sees. Otherwise an image is never
    enlarged. With ``data.max_resolution`` its longer side is reduced to that; without, its shorter
    side is reduced to ``stored_side`` and its longer one centre-cropped to MAX_ASPECT times that.

    Returns:
        (H, W, 3) uint8.
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
    """Return the largest shorter side of stored images of varying size, without max_resolution."""
    return math.ceil(image_size * STORED_MARGIN)


def largest_bytes(data: DataRecipe, fixed_size: bool) -> int:
    """Return the bytes of the largest image that ``fit`` returns."""
    if fixed_size:
        return 3 * data.image_size**2
    if data.max_resolution is not None:
        return 3 * data.max_resolution**2
    return 3 * MAX_ASPECT * stored_side(data.image_size) ** 2


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _crop(image: Image.Image) -> Image.Image:
    """Crop the centre of an image so that its aspect is at most MAX_ASPECT."""
    width, height = image.size
    crop_width = min(width, MAX_ASPECT * height)
    crop_height = min(height, MAX_ASPECT * width)
    left = (width - crop_width) // 2
    top = (height - crop_height) // 2
    cropped = (left, top, left + crop_width, top + crop_height)
    return image if cropped == (0, 0, width, height) else image.crop(cropped)
