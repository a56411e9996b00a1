"""Loading against its peers: torchvision's ImageFolder, timm's loader and FFCV's own loader.

    python -m benchmarks.data cifar10 imagenet
        images per second, medians of interleaved passes, and their ratios
    python -m benchmarks.data first_batch
        seconds to the first batch, with and without compiled code in numba's cache
    python -m benchmarks.data memory
        growth over 50 epochs, with and without further augmentation

All loaders have the same number of workers. torchvision and timm read the original files; FFCV and
this project read the same .beton files: CIFAR-10 stored raw, and the sample of ImageNet stored as
JPEG of at most 500 and of at most 256 pixels. They are made in --folder first.
"""

import argparse
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import v2

from benchmarks.data_loaders import (
    Pass,
    bare_ffcv,
    extracted,
    ours,
    pass_of,
    pass_of_ours,
    timm_loader,
    torchvision_loader,
    written,
)

EPOCHS = 50
"""Epochs over which memory is observed."""
SETTLED = 10
"""Epochs that memory may take to settle."""
MIXED = {
    "rand_augment_operations": 2,
    "color_jitter": 0.4,
    "random_erasing": 0.25,
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
}
"""Data settings of all further augmentations."""


def race(title: str, passes: Mapping[str, Pass], rounds: int) -> dict[str, float]:
    """Measure and print the images per second of each pass.

    Passes take turns. The median is of ``rounds`` of them, after one that does not count.
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
    """Print the ratio of two speeds, and whether it is as high as wanted."""
    found = medians[faster] / medians[slower]
    missed = "" if found >= wanted else "  MISSED"
    print(f"  {faster} / {slower}: {found:.2f} (wanted: {wanted}){missed}", flush=True)


def cifar10(options: argparse.Namespace) -> None:
    """Compare the loaders of CIFAR-10."""
    images, workers = extracted(options, "cifar10") / "train", options.workers
    prepared = raw_cifar10(options)
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
    """Compare the loaders of the sample of ImageNet."""
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
    """Measure the seconds to the first batch, each in a process of its own."""
    prepared = raw_cifar10(options)
    print("\nseconds from the making of the loader to the first batch, in a process of its own")
    cases = {
        "ours, empty cache": ours,
        "ours, compiled before": ours,
        "FFCV": bare_ffcv,
    }
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        for name, function in cases.items():
            code = FIRST_BATCH.format(
                function=function.__name__, prepared=str(prepared), workers=options.workers
            )
            output = subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            print(f"  {name:22} {float(output.split()[-1]):.2f}", flush=True)


FIRST_BATCH = """
import time
from pathlib import Path
from benchmarks.data_loaders import bare_ffcv, ours
began = time.perf_counter()
loader = {function}(Path({prepared!r}), 32, {workers})
next(loader.epoch(0).__enter__() if {function} is ours else iter(loader))
print(time.perf_counter() - began)
"""


def raw_cifar10(options: argparse.Namespace) -> Path:
    """Return data.prepared of CIFAR-10, stored raw."""
    images = extracted(options, "cifar10") / "train"
    return written(options, "cifar10-raw", images, 32, write_mode="raw")


def memory(options: argparse.Namespace) -> None:
    """Measure this process's memory after each epoch of CIFAR-10, and its slope.

    Mapped files do not count.
    """
    prepared = raw_cifar10(options)
    for name, augmentation in (("shift and flip", {}), ("all augmentations, 10,000 images", MIXED)):
        loader = ours(prepared, 32, options.workers, **augmentation)
        own = []
        for epoch in range(EPOCHS):
            with loader.epoch(epoch, start=80 if augmentation else 0) as batches:
                for _ in batches:
                    pass
            status = Path("/proc/self/status").read_text()
            own.append(int(re.findall(r"RssAnon:\s*(\d+)", status)[0]) / 1024)
        slope = np.polyfit(range(EPOCHS - SETTLED), own[SETTLED:], 1)[0]
        print(
            f"\nmemory, {name}: {own[0]:.0f} MB after epoch 1, "
            f"{own[SETTLED]:.0f} after {SETTLED + 1}, {own[-1]:.0f} after {EPOCHS}"
        )
        print(f"  slope from epoch {SETTLED + 1} on: {slope * 1024:+.1f} kB per epoch", flush=True)


PARTS = {function.__name__: function for function in (cifar10, imagenet, first_batch, memory)}


def main() -> None:
    """Run the parts of the benchmark that the command line names."""
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
