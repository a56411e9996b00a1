"""Loaders of the same images for the benchmark of loading: this project's and its peers'."""

import argparse
import importlib.metadata
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, RandomTranslate, Squeeze, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from pipeline.data.beton import measure
from pipeline.data.epoch_loader import EpochLoader
from pipeline.data.loaders import train_loader
from pipeline.data.manifest import Manifest, SplitFile, write_manifest
from pipeline.data.prepared import open_prepared
from pipeline.distributed import World
from pipeline.recipe.load import from_dict

Pass = Callable[[], int]
"""Reads an epoch, and returns the number of its images."""
BATCH_SIZE = {32: 500, 224: 100}
"""Image size -> images per batch."""


def extracted(options: argparse.Namespace, name: str) -> Path:
    """Extract the tar of this name to the benchmark's folder, if that has not been done."""
    target = options.folder / name
    if not target.exists():
        with tarfile.open(options.shared / f"{name}.tar") as tar:
            tar.extractall(target, filter="data")
    return target


def written(options: argparse.Namespace, name: str, images: Path, size: int, **field: Any) -> Path:
    """Return data.prepared of the image folder ``images``, as FFCV's own writer stores it."""
    folder = options.folder / name / f"imagefolder-{size}"
    if not (folder / "manifest.json").exists():
        _write(folder, ImageFolder(images), size, field)
    return folder.parent


def _write(folder: Path, source: ImageFolder, size: int, field: dict[str, Any]) -> None:
    """Write all images as train, 100 as val, and a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for split in ("train", "val"):
        path = folder / f"{split}.beton"
        fields = {"image": RGBImageField(**field), "label": IntField()}
        writer = DatasetWriter(str(path), fields, num_workers=2)
        writer.from_indexed_dataset(source if split == "train" else Subset(source, range(100)))
        file_size, samples, tables = measure(path)
        counts = np.bincount(source.targets[:samples], minlength=len(source.classes)).tolist()
        entries[split] = SplitFile(path.name, file_size, samples, tuple(counts), tables)
    manifest = Manifest(
        source="imagefolder",
        path_name=None,
        image_size=size,
        write_mode=field["write_mode"],
        fixed_size=size == 32,
        classes=tuple(source.classes),
        splits=entries,
        ffcv=importlib.metadata.version("ffcv"),
    )
    write_manifest(folder, manifest)


def ours(prepared: Path, size: int, workers: int, **augmentation: Any) -> EpochLoader:
    """Make this project's loader.

    Images of 32 x 32 are shifted by up to 4 pixels and flipped; others are cropped at random,
    resized and flipped.
    """
    data = {
        "source": "imagefolder",
        "image_size": size,
        "prepared": str(prepared),
        "workers": workers,
        "flip": True,
        **augmentation,
    }
    data |= {"crop_padding": 4} if size == 32 else {"write_mode": "jpg"}
    training = {"epochs": 1, "global_batch_size": BATCH_SIZE[size], "learning_rate": 1}
    recipe = from_dict(
        {"name": "benchmark", "model": {"name": "none"}, "data": data, "training": training}
    )
    return train_loader(recipe, open_prepared(recipe.data), World(), BATCH_SIZE[size])


def pass_of_ours(prepared: Path, size: int, workers: int, **augmentation: Any) -> Pass:
    """Return the pass of this project's loader."""
    loader = ours(prepared, size, workers, **augmentation)
    epochs = iter(range(10**6))

    def read() -> int:
        with loader.epoch(next(epochs)) as batches:
            return sum(len(batch.labels) for batch in batches)

    return read


def bare_ffcv(prepared: Path, size: int, workers: int) -> Loader:
    """Make FFCV's loader with its own operations of the same names."""
    if size == 32:
        image = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(4)]
    else:
        image = [RandomResizedCropRGBImageDecoder((size, size)), RandomHorizontalFlip()]
    pipelines = {
        "image": [*image, ToTensor(), ToTorchImage()],
        "label": [IntDecoder(), ToTensor(), Squeeze()],
    }
    return Loader(
        str(prepared / f"imagefolder-{size}" / "train.beton"),
        BATCH_SIZE[size],
        workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        pipelines=pipelines,
    )


def torchvision_loader(
    images: Path, crop: v2.Transform, size: int, workers: int, count: int
) -> DataLoader:
    """Make torchvision's loader of ``count`` of the images, which stay uint8."""
    source = ImageFolder(images, v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()]))
    chosen = Subset(source, range(0, len(source), len(source) // count))
    return DataLoader(
        chosen,
        BATCH_SIZE[size],
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        drop_last=True,
    )


def timm_loader(images: Path, workers: int) -> Iterable[tuple[Any, Any]]:
    """Make timm's loader of the images."""
    return create_loader(
        create_dataset("", str(images)),
        (3, 224, 224),
        BATCH_SIZE[224],
        num_workers=workers,
        is_training=True,
        use_prefetcher=False,
        color_jitter=None,
        interpolation="bilinear",
        persistent_workers=True,
    )


def pass_of(loader: Iterable[tuple[Any, Any]]) -> Pass:
    """Return the pass of a peer's loader."""
    return lambda: sum(len(labels) for _, labels in loader)
