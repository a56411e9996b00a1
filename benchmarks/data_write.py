"""Writing speed against its limits: ``python -m benchmarks.data_write [--shared FOLDER]``.

One limit is the speed of as many processes that only decode and resize the same images; another is
that of processes that also encode them as JPEG, with FFCV's encoder. FFCV's own writer is measured,
too, on the same decoded images. The images are the originals of ``imagenet_sample.tar``, each
listed several times, so that the fixed costs of a file weigh as little as in a large data set.
Results are medians of interleaved rounds; writing includes indexing, tables, hashes and fsync.
"""

import argparse
import csv
import ctypes
import multiprocessing
import shutil
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import encode_jpeg
from ffcv.writer import DatasetWriter

from pipeline.data.prepare import prepare
from pipeline.data.sources import Split, open_source
from pipeline.data.stored_size import fit
from pipeline.recipe.load import from_dict
from pipeline.recipe.schema import DataRecipe, Recipe

FORK = multiprocessing.get_context("fork")


def recipe_of(table: Path, prepared: Path, resolution: int, workers: int) -> Recipe:
    """Make a recipe that stores images as JPEG, with a longer side of at most ``resolution``."""
    data = {
        "source": "csv",
        "path": str(table),
        "image_size": 224,
        "prepared": str(prepared),
        "workers": workers,
    }
    data |= {"write_mode": "jpg", "max_resolution": resolution}
    training = {"epochs": 1, "global_batch_size": 1, "learning_rate": 0.1}
    return from_dict(
        {"name": "write", "model": {"name": "none"}, "data": data, "training": training}
    )


def unpack(tar: Path, folder: Path, repeats: int) -> Path:
    """Write a CSV that lists every image of ``tar`` ``repeats`` times as train and ten as val."""
    with tarfile.open(tar) as archive:
        archive.extractall(folder, filter="data")
    paths = sorted(folder.rglob("*.JPEG"))
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        writer.writerows(
            (path, path.parent.name, "train") for _ in range(repeats) for path in paths
        )
        writer.writerows((path, path.parent.name, "val") for path in paths[:10])
    return folder / "table.csv"


def limit(split: Split, data: DataRecipe, encode: bool) -> float:
    """Return the seconds in which ``data.workers`` processes decode and resize all images.

    They also encode them if ``encode``.
    """
    counter = FORK.Value(ctypes.c_int64, 0)
    begin = time.perf_counter()
    processes = [
        FORK.Process(target=_decode, args=(split, data, counter, encode))
        for _ in range(data.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return time.perf_counter() - begin


def _decode(split: Split, data: DataRecipe, counter: Any, encode: bool) -> None:
    """Take chunks of images until none is left."""
    while True:
        with counter.get_lock():
            begin = counter.value
            counter.value += data.chunk_size
        if begin >= len(split):
            return
        for index in range(begin, min(begin + data.chunk_size, len(split))):
            pixels = fit(split.read(index), data, split.fixed_size)
            if encode:
                encode_jpeg(pixels, data.jpeg_quality)


def ours(recipe: Recipe) -> float:
    """Return the seconds of `coda prepare`."""
    shutil.rmtree(recipe.data.folder, ignore_errors=True)
    begin = time.perf_counter()
    prepare(recipe)
    return time.perf_counter() - begin


class _Indexed:
    """A split with the interface that FFCV's writer needs."""

    def __init__(self, split: Split, data: DataRecipe):
        self.split, self.data = split, data

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        pixels = fit(self.split.read(index), self.data, self.split.fixed_size)
        return pixels, int(self.split.labels[index])


def ffcv(split: Split, data: DataRecipe, path: Path) -> float:
    """Return the seconds of FFCV's writer."""
    fields = {
        "image": RGBImageField(write_mode="jpg", jpeg_quality=data.jpeg_quality),
        "label": IntField(),
    }
    begin = time.perf_counter()
    DatasetWriter(str(path), fields, num_workers=data.workers).from_indexed_dataset(
        _Indexed(split, data), chunksize=data.chunk_size
    )
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--shared", type=Path, default=Path("../shared/data"), help="folder of imagenet_sample.tar"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=8, help="how often each image is listed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[500, 256])
    options = parser.parse_args()
    print(
        "| stored as JPEG up to | decoding alone, images/s | and encoding | coda prepare "
        "| FFCV's writer | prepare / decoding | / both |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = unpack(options.shared / "imagenet_sample.tar", folder / "images", options.repeats)
        for resolution in options.resolutions:
            recipe = recipe_of(table, folder / "data", resolution, options.workers)
            split = open_source(recipe.data)["train"]
            seconds: dict[str, list[float]] = {"decode": [], "encode": [], "coda": [], "ffcv": []}
            for _ in range(options.rounds):
                seconds["decode"].append(limit(split, recipe.data, encode=False))
                seconds["encode"].append(limit(split, recipe.data, encode=True))
                seconds["coda"].append(ours(recipe))
                seconds["ffcv"].append(ffcv(split, recipe.data, folder / "ffcv.beton"))
            speeds = " | ".join(
                f"{len(split) / statistics.median(times):.0f}" for times in seconds.values()
            )
            ratios = " | ".join(
                f"{median_ratio(seconds[name], seconds['coda']):.2f}"
                for name in ("decode", "encode")
            )
            print(f"| {resolution} px | {speeds} | {ratios} |", flush=True)


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


if __name__ == "__main__":
    main()
