"""scikit-learn's handwritten digits, which need no download."""

from collections.abc import Mapping

import numpy as np

from pipeline.data.sources.split import ArraySplit, Split
from pipeline.recipe.schema import DataRecipe

DIGITS_VAL = 360
"""Validation images, of 1,797."""


def digits(data: DataRecipe) -> Mapping[str, Split]:
    """Open scikit-learn's 1,797 digits of 8 x 8 pixels with 17 levels.

    The split into 1,437 and 360 is stratified, and the same for every seed of a recipe.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=3)  # (N, 8, 8) -> (N, 8, 8, 3)
    parts = train_test_split(
        np.arange(len(rgb)), test_size=DIGITS_VAL, random_state=0, stratify=bunch.target
    )
    classes = tuple(str(name) for name in bunch.target_names)
    return {
        split: ArraySplit(
            classes, bunch.target[part].astype(np.int64), True, rgb[part], f"digits {split}"
        )
        for split, part in zip(("train", "val"), parts, strict=True)
    }
