"""torchvision's classification data sets: CIFAR-10 and CIFAR-100, and any other by
``torchvision.<class name>``.
"""

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
# torchvision's, the first it accepts
SPLIT_WORDS = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "test")}
# attributes in which its data sets keep the labels
LABELS = ("targets", "labels", "_labels", "y")
# or lists of (file, label)
SAMPLES = ("samples", "_samples", "imgs")


@dataclass(frozen=True)
class TorchvisionSplit(Split):
    """Images of a torchvision data set."""

    images: Any
    """Index -> (PIL image, label)."""
    name: str

    def read(self, index: int) -> Image.Image:
        try:
            image = self.images[index][0]
        except (MemoryError, OSError):
            raise
        except Exception as error:
            # its readers raise errors of many kinds on damaged files
            raise BrokenImage(" ".join(str(error).split()) or type(error).__name__) from error
        return to_rgb(image)

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"


def cifar10(data: DataRecipe) -> Mapping[str, Split]:
    """CIFAR-10: a folder or tar with train/<class>/ and test/<class>/, torchvision's download
    folder, or (path null) a download.
    """
    from torchvision.datasets import CIFAR10

    return _cifar(data, CIFAR10)


def cifar100(data: DataRecipe) -> Mapping[str, Split]:
    """CIFAR-100, from the same as CIFAR-10."""
    from torchvision.datasets import CIFAR100

    return _cifar(data, CIFAR100)


def any_of_torchvision(data: DataRecipe) -> Mapping[str, Split]:
    """The data set that ``data.source`` names, with torchvision's own division into train and val
    (or test).

    ``data.path`` is torchvision's root folder; where it is null, the data set is downloaded. Sets
    that torchvision keeps in memory are stored at ``data.image_size``.

    Raises:
        UserError: there is no such data set, it is not there, it has no such division, or no class
            numbers as labels.
    """
    import torchvision

    name = data.source.removeprefix(PREFIX)
    kind = getattr(torchvision.datasets, name, None)
    if not inspect.isclass(kind) or not issubclass(kind, torchvision.datasets.VisionDataset):
        raise UserError(
            f"data.source is {data.source!r}: torchvision.datasets has no {name}; write it as it does, such as Food101"
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
            f"{data.source} in {root}: {_failed(data, error)}; fetch {kind.url} on a machine with internet and set data.path to its folder"
        ) from error
    return {
        split: ArraySplit(
            tuple(part.classes),
            np.array(part.targets, np.int64),
            True,
            part.data,
            f"{data.source} {split}",
        )
        for split, part in parts.items()
    }


def _failed(data: DataRecipe, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{'the download failed' if data.path is None else 'is incomplete'} ({reason})"


def _open(kind: type, data: DataRecipe, split: str) -> Any:
    known = inspect.signature(kind).parameters
    root = data.path or str(Path(data.prepared) / "downloads")
    download = {"download": data.path is None} if "download" in known else {}
    if "train" in known:
        choices: list[dict[str, Any]] = [{"train": split == "train"}]
    elif "split" in known:
        choices = [{"split": word} for word in SPLIT_WORDS[split]]
    else:
        raise UserError(
            f"{data.source} has no division into train and val; bring it into the layout of data.source imagefolder or csv"
        )
    for choice in choices:
        try:
            return kind(root, **choice, **download)
        except ValueError:
            # this data set calls the split otherwise
            continue
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{data.source} in {root}: {_failed(data, error)}; data.path is torchvision's root folder"
            ) from error
    raise UserError(
        f"{data.source} calls none of its splits {' or '.join(SPLIT_WORDS[split])}; use data.source imagefolder or csv"
    )


def _labels(part: Any, name: str) -> np.ndarray:
    """(N,) int64, without decoding the images where the data set shows its labels."""
    lists = [getattr(part, attribute, None) for attribute in LABELS]
    lists += [
        [label for _, label in pairs]
        for pairs in (getattr(part, attribute, None) for attribute in SAMPLES)
        if pairs is not None
    ]
    for found in lists:
        if found is not None and len(found) == len(part) > 0 and np.ndim(found) == 1:
            break
    else:
        found = [
            part[index][1] for index in tqdm(range(len(part)), f"labels of {name}", leave=False)
        ]
    labels = np.asarray(found)
    if not len(labels) or labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(
            f"{name}: is empty, or its labels are not class numbers; only classification data sets can be prepared"
        )
    return labels.astype(np.int64)
