"""Data sources: a name in a recipe -> the images and labels of its train and val split, before
anything is written.

A new data set is one entry in ``SOURCES``: a function from the recipe's data section to ``{"train":
Split, "val": Split}``.
"""

import difflib
from collections.abc import Callable, Mapping

import numpy as np

from pipeline.data.sources.folders import imagefolder, imagenet, imagenet100, tinyimagenet
from pipeline.data.sources.split import ArraySplit, Split
from pipeline.data.sources.table import csv_of_paths
from pipeline.data.sources.torchvision_sets import PREFIX, any_of_torchvision, cifar10, cifar100
from pipeline.data.sources.webdataset import webdataset
from pipeline.errors import UserError
from pipeline.recipe.schema import DataRecipe

# of 1,797
DIGITS_VAL = 360


def open_source(data: DataRecipe) -> Mapping[str, Split]:
    """The splits "train" and "val" of the recipe's source.

    Raises:
        UserError: unknown source, nothing valid at its path, or settings that do not fit it.
    """
    if data.source.startswith(PREFIX):
        splits = any_of_torchvision(data)
    elif data.source in SOURCES:
        splits = SOURCES[data.source](data)
    else:
        close = difflib.get_close_matches(data.source, SOURCES, n=1)
        hint = (
            f"did you mean {close[0]}?" if close else f"valid: {', '.join(SOURCES)}, {PREFIX}<name>"
        )
        raise UserError(f"data.source is {data.source!r}: there is no such source; {hint}")
    if data.max_resolution is not None and splits["train"].fixed_size:
        raise UserError(
            f"data.max_resolution is {data.max_resolution}, but {data.source} is stored at data.image_size; remove it"
        )
    return splits


def digits(data: DataRecipe) -> Mapping[str, Split]:
    """scikit-learn's 1,797 digits, 8 x 8 pixels of 17 levels: a fixed stratified split into 1,437
    and 360, whatever the recipe's seed.
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


SOURCES: dict[str, Callable[[DataRecipe], Mapping[str, Split]]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagefolder": imagefolder,
    "imagenet": imagenet,
    "imagenet100": imagenet100,
    "tinyimagenet": tinyimagenet,
    "webdataset": webdataset,
    "csv": csv_of_paths,
}
