"""Classification data sets of torchvision: CIFAR-10, CIFAR-100, and any by its class name."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.data.images import BrokenImage, to_rgb
from pipeline.data.sources.folders import class_folders
from pipeline.data.sources.split import ArraySplit, Split
from pipeline.errors import UserError
from pipeline.recipe.schema import DataRecipe

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

PREFIX = "torchvision."
"""Start of data.source, before the name of a class in torchvision.datasets."""
SPLIT_WORDS = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "test")}
"""Split -> torchvision's names for it; the first that a data set accepts is used."""
LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")
"""Attributes in which torchvision's data sets keep the labels."""
SAMPLE_ATTRIBUTES = ("samples", "_samples", "imgs")
"""Attributes in which they keep lists of (file, label)."""


@dataclass(frozen=True)
class TorchvisionSplit(Split):
    """Images of a torchvision data set."""

    images: Any
    """The data set: index -> (PIL image, label)."""
    name: str
    """Name of the split, for messages."""

    def read(self, index: int) -> Image.Image:
        """Let torchvision read an image."""
        try:
            image = self.images[index][0]
        except (MemoryError, OSError):
            raise
        except Exception as error:
            # torchvision's readers raise errors of many kinds on damaged files.
            raise BrokenImage(" ".join(str(error).split()) or type(error).__name__) from error
        return to_rgb(image)

    def describe(self, index: int) -> str:
        """Return the image's index and the name of the split."""
        return f"image {index} of {self.name}"


def cifar10(data: DataRecipe) -> Mapping[str, Split]:
    """Open CIFAR-10.

    ``data.path`` is a folder or tar with train/<class>/ and test/<class>/, or torchvision's
    download folder; where it is null, the data set is downloaded.
    """
    from torchvision.datasets import CIFAR10

    return _cifar(data, CIFAR10)


def cifar100(data: DataRecipe) -> Mapping[str, Split]:
    """Open CIFAR-100, from the same places as CIFAR-10."""
    from torchvision.datasets import CIFAR100

    return _cifar(data, CIFAR100)


def any_of_torchvision(data: DataRecipe) -> Mapping[str, Split]:
    """Open the data set that ``data.source`` names, with torchvision's division into splits.

    Its val or test split is used as val. ``data.path`` is torchvision's root folder; where it is
    null, the data set is downloaded. Sets that torchvision keeps in memory are stored at
    ``data.image_size``.

    Raises:
        UserError: torchvision has no such data set, its files are missing, it has no such division,
            or its labels are not class numbers.
    """
    import torchvision

    name = data.source.removeprefix(PREFIX)
    kind = getattr(torchvision.datasets, name, None)
    if not inspect.isclass(kind) or not issubclass(kind, torchvision.datasets.VisionDataset):
        raise UserError(
            f"data.source is {data.source!r}: torchvision.datasets has no {name}; "
            "write it as it does, such as Food101"
        )
    parts = {split: _open(kind, data, split) for split in SPLIT_WORDS}
    labels = {split: _labels(part, f"{data.source} {split}") for split, part in parts.items()}
    count = 1 + int(max(numbers.max() for numbers in labels.values()))
    named = getattr(parts["train"], "classes", None) or ()
    classes = tuple(map(str, named if len(named) >= count else range(count)))
    return {
        split: TorchvisionSplit(
            classes, labels[split], hasattr(part, "data"), part, f"{data.source} {split}"
        )
        for split, part in parts.items()
    }


def _cifar(data: DataRecipe, kind: "type[CIFAR10]") -> Mapping[str, Split]:
    """Open CIFAR from folders of classes, torchvision's files or archive, or a download."""
    from torchvision.datasets.utils import check_integrity, extract_archive

    root = Path(data.prepared) / "downloads"
    if data.path is not None:
        path = Path(data.path)
        archive = path / kind.filename
        if (path / kind.base_folder).is_dir():
            root = path
        elif not archive.is_file():
            return class_folders(data, {"train": "train", "val": "test"}, fixed_size=True)
        elif check_integrity(str(archive), kind.tgz_md5):
            extract_archive(str(archive), str(root))
        else:
            raise UserError(
                f"{archive}: is damaged (its MD5 is not the published one); fetch it again"
            )
    try:
        parts = {
            split: kind(str(root), train=split == "train", download=data.path is None)
            for split in ("train", "val")
        }
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{data.source} in {root}: {_failure(data, error)}; fetch {kind.url} on a machine "
            "with internet and set data.path to its folder"
        ) from error
    return {
        split: ArraySplit(
            classes=tuple(part.classes),
            labels=np.array(part.targets, np.int64),
            fixed_size=True,
            images=part.data,
            name=f"{data.source} {split}",
        )
        for split, part in parts.items()
    }


def _failure(data: DataRecipe, error: Exception) -> str:
    """Return in words why a data set could not be opened."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{'the download failed' if data.path is None else 'is incomplete'} ({reason})"


def _open(kind: type, data: DataRecipe, split: str) -> Any:
    """Open one split of torchvision's data set ``kind``."""
    known = inspect.signature(kind).parameters
    root = data.path or str(Path(data.prepared) / "downloads")
    download = {"download": data.path is None} if "download" in known else {}
    if "train" in known:
        choices: list[dict[str, Any]] = [{"train": split == "train"}]
    elif "split" in known:
        choices = [{"split": word} for word in SPLIT_WORDS[split]]
    else:
        raise UserError(
            f"{data.source} has no division into train and val; "
            "bring it into the layout of data.source imagefolder or csv"
        )
    for choice in choices:
        try:
            return kind(root, **choice, **download)
        except ValueError:
            # This data set has another name for the split.
            continue
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{data.source} in {root}: {_failure(data, error)}; "
                "data.path is torchvision's root folder"
            ) from error
    raise UserError(
        f"{data.source} calls none of its splits {' or '.join(SPLIT_WORDS[split])}; "
        "use data.source imagefolder or csv"
    )


def _labels(part: Any, name: str) -> np.ndarray:
    """Return the labels (N,) int64 of a data set, and check that they are class numbers."""
    labels = np.asarray(_found_labels(part, name))
    if not len(labels) or labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(
            f"{name}: is empty, or its labels are not class numbers; "
            "only classification data sets can be prepared"
        )
    return labels.astype(np.int64)


def _found_labels(part: Any, name: str) -> Any:
    """Return a data set's list of labels; its images are decoded only if it keeps no list."""
    lists = [getattr(part, attribute, None) for attribute in LABEL_ATTRIBUTES]
    for attribute in SAMPLE_ATTRIBUTES:
        pairs = getattr(part, attribute, None)
        if pairs is not None:
            lists.append([label for _, label in pairs])
    for found in lists:
        if found is not None and len(found) == len(part) > 0 and np.ndim(found) == 1:
            return found
    progress = tqdm(range(len(part)), f"labels of {name}", leave=False)
    return [part[index][1] for index in progress]
