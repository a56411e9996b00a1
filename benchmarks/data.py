"""Loading against its peers: torchvision's ImageFolder with a DataLoader, timm's loader, and FFCV's
own loader, in one run.

    python -m benchmarks.data cifar10 imagenet     images per second, medians of interleaved passes,
    and their ratios python -m benchmarks.data first_batch          seconds to the first batch, with
    and without compiled code in numba's cache python -m benchmarks.data memory               growth
    over 50 epochs, with and without further augmentation

All loaders have the same number of workers. torchvision and timm read the original files, FFCV and
this project the same .beton
files: CIFAR-10 raw, the sample of ImageNet as JPEG of at most 500 and of at most 256 pixels. They
    are made in --folder first.
"""

import argparse
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
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
from pipeline.data.loaders import train_loader
from pipeline.data.manifest import Manifest, SplitFile, write_manifest
from pipeline.data.prepared import open_prepared
from pipeline.distributed import World
from pipeline.recipe.load import from_dict

# reads an epoch, returns how many images that were
Pass = Callable[[], int]
# image size -> images per batch
BATCH = {32: 500, 224: 100}
# of the memory's growth; epochs that it may take to settle
EPOCHS, SETTLED = 50, 10
MIXED = dict(
    rand_augment_operations=2,
    color_jitter=0.4,
    random_erasing=0.25,
    mixup_alpha=0.2,
    cutmix_alpha=1.0,
)


def extracted(options: argparse.Namespace, name: str) -> Path:
    target = options.folder / name
    if not target.exists():
        with tarfile.open(options.shared / f"{name}.tar") as tar:
            tar.extractall(target, filter="data")
    return target


def written(options: argparse.Namespace, name: str, images: Path, size: int, **field) -> Path:
    """data.prepared of the image folder ``images``, as FFCV's own writer stores it."""
    folder = options.folder / name / f"imagefolder-{size}"
    if not (folder / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        source = ImageFolder(images)
        for split in ("train", "val"):
            writer = DatasetWriter(
                str(folder / f"{split}.beton"),
                {"image": RGBImageField(**field), "label": IntField()},
                num_workers=2,
            )
            writer.from_indexed_dataset(source if split == "train" else Subset(source, range(100)))
        entries = {}
        for split in ("train", "val"):
            size_, samples, tables = measure(folder / f"{split}.beton")
            counts = np.bincount(source.targets[:samples], minlength=len(source.classes)).tolist()
            entries[split] = SplitFile(f"{split}.beton", size_, samples, tuple(counts), tables)
        mode, version = field["write_mode"], importlib.metadata.version("ffcv")
        write_manifest(
            folder,
            Manifest(
                "imagefolder", None, size, mode, size == 32, tuple(source.classes), entries, version
            ),
        )
    return folder.parent


def ours(prepared: Path, size: int, workers: int, **augmentation):
    """This project's loader: a shift by up to 4 pixels and flip of 32 x 32 images, random resized
    crop and flip of others.
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
    training = {"epochs": 1, "global_batch_size": BATCH[size], "learning_rate": 1}
    recipe = from_dict(
        {"name": "benchmark", "model": {"name": "none"}, "data": data, "training": training}
    )
    return train_loader(recipe, open_prepared(recipe.data), World(), BATCH[size])


def pass_of_ours(*arguments, **augmentation) -> Pass:
    loader, epochs = ours(*arguments, **augmentation), iter(range(10**6))

    def read() -> int:
        with loader.epoch(next(epochs)) as batches:
            return sum(len(batch.labels) for batch in batches)

    return read


def bare_ffcv(prepared: Path, size: int, workers: int) -> Loader:
    """FFCV's loader with its own operations of the same names."""
    if size == 32:
        image = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(4)]
    else:
        image = [RandomResizedCropRGBImageDecoder((size, size)), RandomHorizontalFlip()]
    pipelines = {
        "image": [*image, ToTensor(), ToTorchImage()],
        "label": [IntDecoder(), ToTensor(), Squeeze()],
    }
    file = str(prepared / f"imagefolder-{size}" / "train.beton")
    return Loader(
        file, BATCH[size], workers, os_cache=True, order=OrderOption.RANDOM, pipelines=pipelines
    )


def torchvision_loader(
    images: Path, crop: v2.Transform, size: int, workers: int, count: int
) -> DataLoader:
    """torchvision's on ``count`` of the images, which stay uint8."""
    source = ImageFolder(images, v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()]))
    chosen = Subset(source, range(0, len(source), len(source) // count))
    return DataLoader(
        chosen,
        BATCH[size],
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        drop_last=True,
    )


def timm_loader(images: Path, workers: int):
    options = dict(
        is_training=True,
        use_prefetcher=False,
        color_jitter=None,
        interpolation="bilinear",
        persistent_workers=True,
    )
    return create_loader(
        create_dataset("", str(images)), (3, 224, 224), BATCH[224], num_workers=workers, **options
    )


def pass_of(loader) -> Pass:
    return lambda: sum(len(labels) for _, labels in loader)


def race(title: str, passes: Mapping[str, Pass], rounds: int) -> dict[str, float]:
    """Images per second of each: the median of ``rounds`` passes, in turns, after one that does not
    count.
    """
    speeds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(rounds + 1):
        for name, read in passes.items():
            began = time.perf_counter()
            images = read()
            if turn:
                speeds[name].append(images / (time.perf_counter() - began))
    print(f"\n{title}: images per second, median of {rounds} (least to most)")
    for name, found in speeds.items():
        print(f"  {name:16} {statistics.median(found):8.0f} ({min(found):.0f} to {max(found):.0f})")
    return {name: statistics.median(found) for name, found in speeds.items()}


def compare(medians: Mapping[str, float], faster: str, slower: str, wanted: float) -> None:
    found = medians[faster] / medians[slower]
    print(
        f"  {faster} / {slower}: {found:.2f} (wanted: {wanted})"
        + ("" if found >= wanted else "  MISSED"),
        flush=True,
    )


def cifar10(options: argparse.Namespace) -> None:
    images, workers = extracted(options, "cifar10") / "train", options.workers
    prepared = written(options, "cifar10-raw", images, 32, write_mode="raw")
    passes = {
        "ours": pass_of_ours(prepared, 32, workers),
        "FFCV": pass_of(bare_ffcv(prepared, 32, workers)),
        "torchvision": pass_of(
            torchvision_loader(images, v2.RandomCrop(32, padding=4), 32, workers, 10_000)
        ),
    }
    medians = race(f"CIFAR-10, shift and flip, {workers} workers", passes, options.rounds)
    compare(medians, "ours", "torchvision", 12)
    compare(medians, "ours", "FFCV", 0.95)


def imagenet(options: argparse.Namespace) -> None:
    images, workers = extracted(options, "imagenet_sample") / "val", options.workers
    prepared = {
        most: written(
            options,
            f"imagenet-{most}",
            images,
            224,
            write_mode="jpg",
            max_resolution=most,
            jpeg_quality=90,
        )
        for most in (500, 256)
    }
    passes: dict[str, Pass] = {}
    for most, folder in prepared.items():
        passes[f"ours, {most} px"] = pass_of_ours(folder, 224, workers)
        passes[f"FFCV, {most} px"] = pass_of(bare_ffcv(folder, 224, workers))
    passes["torchvision"] = pass_of(
        torchvision_loader(images, v2.RandomResizedCrop(224, antialias=True), 224, workers, 1000)
    )
    passes["timm"] = pass_of(timm_loader(images, workers))
    passes["ours, 256 px, all augmentations"] = pass_of_ours(prepared[256], 224, workers, **MIXED)
    medians = race(
        f"Sample of ImageNet, random resized crop to 224 and flip, {workers} workers",
        passes,
        options.rounds,
    )
    for most, wanted in ((500, 1.8), (256, 5.0)):
        for peer in ("torchvision", "timm"):
            compare(medians, f"ours, {most} px", peer, wanted)
        compare(medians, f"ours, {most} px", f"FFCV, {most} px", 0.95)


def first_batch(options: argparse.Namespace) -> None:
    prepared = written(
        options, "cifar10-raw", extracted(options, "cifar10") / "train", 32, write_mode="raw"
    )
    print(
        "\nseconds from the making of the loader to the first batch, each in a process of its own"
    )
    with tempfile.TemporaryDirectory() as cache:
        for name, function in (
            ("ours, empty cache", "ours"),
            ("ours, compiled before", "ours"),
            ("FFCV", "bare_ffcv"),
        ):
            code = f"""
import time
from pathlib import Path
from benchmarks.data import bare_ffcv, ours
began = time.perf_counter()
loader = {function}(Path({str(prepared)!r}), 32, {options.workers})
next(loader.epoch(0).__enter__() if {function} is ours else iter(loader))
print(time.perf_counter() - began)
"""
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
            output = subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            print(f"  {name:22} {float(output.split()[-1]):.2f}", flush=True)


def memory(options: argparse.Namespace) -> None:
    """This process's own memory (not what it has mapped of files) after each epoch of CIFAR-10, and
    the slope of a line through it.
    """
    prepared = written(
        options, "cifar10-raw", extracted(options, "cifar10") / "train", 32, write_mode="raw"
    )
    for name, augmentation in (("shift and flip", {}), ("all augmentations, 10,000 images", MIXED)):
        loader, own = ours(prepared, 32, options.workers, **augmentation), []
        for epoch in range(EPOCHS):
            with loader.epoch(epoch, start=80 if augmentation else 0) as batches:
                for _ in batches:
                    pass
            own.append(
                int(re.findall(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[0])
                / 1024
            )
        slope = np.polyfit(range(EPOCHS - SETTLED), own[SETTLED:], 1)[0]
        print(
            f"\nmemory, {name}: {own[0]:.0f} MB after epoch 1, {own[SETTLED]:.0f} after {SETTLED + 1}, {own[-1]:.0f} after {EPOCHS}"
        )
        print(f"  slope from epoch {SETTLED + 1} on: {slope * 1024:+.1f} kB per epoch", flush=True)


PARTS = {function.__name__: function for function in (cifar10, imagenet, first_batch, memory)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all")
    parser.add_argument(
        "--shared",
        type=Path,
        default=Path("../shared/data"),
        help="folder of cifar10.tar and imagenet_sample.tar",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "coda-benchmark-data",
        help="for what they hold",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("ffcv", "torch", "torchvision", "timm")
    )
    print(f"{len(os.sched_getaffinity(0))} processors, {versions}")
    for part in options.parts or PARTS:
        PARTS[part](options)


if __name__ == "__main__":
    main()
