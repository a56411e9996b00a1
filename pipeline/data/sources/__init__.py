"""Data sources: a name in a recipe -> images and labels of its splits, before anything is written.

A data set is added by one entry in ``SOURCES``.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.data.sources.digits import digits
from pipeline.data.sources.folders import imagefolder, imagenet, imagenet100, tinyimagenet
from pipeline.data.sources.split import Split
from pipeline.data.sources.table import csv_of_paths
from pipeline.data.sources.torchvision_sets import PREFIX, any_of_torchvision, cifar10, cifar100
from pipeline.data.sources.webdataset import webdataset
from pipeline.errors import UserError
from pipeline.recipe.schema import DataRecipe


@dataclass(frozen=True)
class Source:
    """A data set, or a layout that any data set may have."""

    open: Callable[[DataRecipe], Mapping[str, Split]]
    """The recipe's data section -> {"train": Split, "val": Split}."""
    images: int | None = None
    """Number of training images, where it is known in advance."""
    classes: int | None = None
    """Number of classes, where it is known in advance."""
    fixed_size: bool = False
    """Whether images are stored as squares of data.image_size, and not cropped when loaded."""


SOURCES: dict[str, Source] = {
    "digits": Source(digits, 1_437, 10, fixed_size=True),
    "cifar10": Source(cifar10, 50_000, 10, fixed_size=True),
    "cifar100": Source(cifar100, 50_000, 100, fixed_size=True),
    "imagefolder": Source(imagefolder),
    "imagenet": Source(imagenet, 1_281_167, 1_000),
    # At most, as a class has up to 1,300 images.
    "imagenet100": Source(imagenet100, 130_000, 100),
    "tinyimagenet": Source(tinyimagenet, 100_000, 200, fixed_size=True),
    "csv": Source(csv_of_paths),
    "webdataset": Source(webdataset),
}


def find_source(name: str) -> Source:
    """Find a source by its name in a recipe.

    Raises:
        UserError: there is no such source.
    """
    if name in SOURCES:
        return SOURCES[name]
    if name.startswith(PREFIX):
        return Source(any_of_torchvision)
    close = difflib.get_close_matches(name, SOURCES, n=1)
    valid = f"valid: {', '.join(SOURCES)}, {PREFIX}<name>"
    hint = f"did you mean {close[0]}?" if close else valid
    raise UserError(f"data.source is {name!r}: there is no such source; {hint}")


def open_source(data: DataRecipe) -> Mapping[str, Split]:
    """Open the splits "train" and "val" of the recipe's source.

    Raises:
        UserError: the source is unknown, nothing valid is at its path, or settings do not fit it.
    """
    splits = find_source(data.source).open(data)
    if data.max_resolution is not None and splits["train"].fixed_size:
        raise UserError(
            f"data.max_resolution is {data.max_resolution}, but {data.source} is stored at "
            "data.image_size; remove it"
        )
    return splits
