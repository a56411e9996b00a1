"""The check of prepared files: every byte, and every image, decoded as a training run does it."""

import os
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from pipeline.data.beton import REMEDY
from pipeline.data.epoch_loader import EpochLoader, Visit
from pipeline.data.manifest import MANIFEST_NAME, Manifest, SplitFile, open_manifest
from pipeline.data.sampling import whole_boxes
from pipeline.errors import UserError
from pipeline.recipe.schema import DataRecipe

BATCH_SIZE = 64
BLOCK_BYTES = 1 << 24
"""Bytes that are read at a time."""


def verify(folder: Path, data: DataRecipe | None = None) -> str:
    """Check all files of a prepared folder.

    Args:
        folder: the prepared folder.
        data: settings with which it must have been prepared; None allows any.

    Returns:
        A line for each file about what was checked.

    Raises:
        UserError: something is missing, damaged or prepared with other settings.
    """
    manifest = open_manifest(folder)
    if data is not None:
        manifest.require(data)
    lines = []
    for name, split in manifest.splits.items():
        path = folder / split.file
        if split.xxh128:
            _compare_bytes(path, split)
        _decode(path, manifest, name)
        hashed = "no hash, as an earlier version prepared it"
        if split.xxh128:
            hashed = f"XXH128 {split.xxh128}"
        left_out = f", {len(split.skipped)} left out as broken" if split.skipped else ""
        lines.append(
            f"{path}: {split.samples} images of {len(manifest.classes)} classes, "
            f"{split.bytes} bytes, {hashed}{left_out}"
        )
    return "\n".join(lines)


def _compare_bytes(path: Path, split: SplitFile) -> None:
    digest = xxhash.xxh3_128()
    with (
        open(path, "rb") as file,
        tqdm(total=split.bytes, desc=f"reading {path.name}", unit="B", unit_scale=True) as bar,
    ):
        while content := file.read(BLOCK_BYTES):
            digest.update(content)
            bar.update(len(content))
    if digest.hexdigest() != split.xxh128:
        raise UserError(
            f"{path}: is damaged: its XXH128 is {digest.hexdigest()} and {MANIFEST_NAME} says "
            f"{split.xxh128}; remove it and {REMEDY}"
        )


def _decode(path: Path, manifest: Manifest, name: str) -> None:
    """Decode all images, and check that the manifest has the number of each class."""
    split = manifest.splits[name]
    everything = np.arange(split.samples)
    visit = Visit(
        order=lambda epoch: everything,
        size=lambda epoch: manifest.image_size,
        boxes=lambda heights, widths, *_: whole_boxes(heights, widths),
    )
    loader = EpochLoader(path, manifest, name, BATCH_SIZE, len(os.sched_getaffinity(0)), visit)
    counts = np.zeros(len(manifest.classes), np.int64)
    with (
        loader.epoch(0) as batches,
        tqdm(total=split.samples, desc=f"decoding {path.name}", unit="image") as bar,
    ):
        for batch in batches:
            labels = batch.labels.numpy()
            if labels.min() < 0 or labels.max() >= len(counts):
                raise UserError(
                    f"{path}: has labels outside the {len(counts)} classes in {MANIFEST_NAME}; "
                    f"remove it and {REMEDY}"
                )
            counts += np.bincount(labels, minlength=len(counts))
            bar.update(len(labels))
    if tuple(counts.tolist()) != split.class_counts:
        raise UserError(
            f"{path}: its images per class are not those in {MANIFEST_NAME}; remove it and {REMEDY}"
        )
