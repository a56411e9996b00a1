"""WebDataset shards: tar files in which 0001.jpg and 0001.cls (or 0001.json) are a sample."""

import glob
import json
import multiprocessing
import re
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from pipeline.data.images import is_image, read_file
from pipeline.data.sources.archive import index_tar
from pipeline.data.sources.split import Split, TarSplit
from pipeline.errors import UserError
from pipeline.recipe.schema import DataRecipe

SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}
"""Word in the name of a shard or its folder -> split."""
MAX_CLASSES = 1 << 20
"""Number of classes that a label must lie below."""
LABEL_KEYS = ("label", "cls")
"""Keys of a label in a .json file."""
CLASSES_FILE = "classes.txt"
"""File beside the shards with the names of the classes 0, 1, ..., one per line."""


class _Sample(NamedTuple):
    """An image in a shard."""

    name: str
    """Name of the member."""
    offset: int
    """Address of its bytes in the shard."""
    length: int
    """Number of its bytes."""
    label: int | str
    """Number or name of its class."""


def webdataset(data: DataRecipe) -> Mapping[str, Split]:
    """Open the shards that ``data.path`` names.

    It is a folder, or a pattern with wildcards or braces such as
    ``/data/{train,val}-{000..099}.tar``. A shard's split follows from a word in its name, or else
    from its folder's name: train; val, valid, validation or test. The label is the text of
    <key>.cls, or ``label`` or ``cls`` in <key>.json. Labels are class numbers, or names, which are
    then sorted.

    Raises:
        UserError: shards are missing, are damaged, belong to no split or have members that point
            outside, or a sample is incomplete.
    """
    shards = _shards(data)
    tars = tuple(path for path, _ in shards)
    samples: dict[str, list[tuple[int, _Sample]]] = {"train": [], "val": []}
    workers, fork = min(data.workers, len(tars)), multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(workers, fork) as pool:
            found = tqdm(
                pool.map(_samples, tars), "indexing shards", len(tars), leave=False, unit="shard"
            )
            for number, ((_, split), result) in enumerate(zip(shards, found, strict=True)):
                samples[split] += [(number, sample) for sample in result]
    except BrokenProcessPool as error:
        raise UserError(
            f"data.path {data.path}: a process that indexed shards was killed, "
            "often for want of memory"
        ) from error
    for split, chosen in samples.items():
        if not chosen:
            raise UserError(f"data.path {data.path}: its shards of split {split} hold no images")
    labels = {sample.label for chosen in samples.values() for _, sample in chosen}
    classes, number_of = _classes(tars, labels)
    return {
        split: TarSplit(
            classes=classes,
            labels=np.array([number_of[sample.label] for _, sample in chosen], np.int64),
            fixed_size=False,
            tars=tars,
            names=tuple(sample.name for _, sample in chosen),
            extents=np.array(
                [(tar, sample.offset, sample.length) for tar, sample in chosen], np.int64
            ),
        )
        for split, chosen in samples.items()
    }


def _shards(data: DataRecipe) -> list[tuple[Path, str]]:
    """Find the shards, each with its split."""
    from braceexpand import braceexpand

    if data.path is None:
        raise UserError(
            "data.path is not set; webdataset needs a folder of tar shards, "
            "or a pattern such as shards/{train,val}-*.tar"
        )
    path = Path(data.path)
    if path.is_dir():
        paths = sorted([*path.glob("*.tar"), *path.glob("*/*.tar")])
    else:
        paths = []
        try:
            # One by one, as braces can name more shards than fit into memory.
            for pattern in braceexpand(data.path):
                matches = sorted(glob.glob(pattern, recursive=True))
                if not matches:
                    raise UserError(f"data.path {data.path}: there is no shard {pattern}")
                paths += [Path(match) for match in matches]
        except ValueError as error:
            raise UserError(
                f"data.path {data.path}: is not a pattern of shards ({error})"
            ) from error
    if not paths:
        raise UserError(f"data.path {path}: holds no .tar shards")
    return [(shard, _split_of(shard)) for shard in dict.fromkeys(paths)]


def _split_of(shard: Path) -> str:
    """Return the split of a shard, by the words in its name or its folder's name."""
    words = re.split("[^a-z]+", shard.name.lower())
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    if not splits:
        splits = {SPLIT_WORDS.get(shard.parent.name.lower(), "")}
    if splits in ({"train"}, {"val"}):
        return splits.pop()
    raise UserError(
        f"{shard}: neither its name nor its folder says train or val; "
        "rename it, or choose others with data.path"
    )


def _samples(path: Path) -> list[_Sample]:
    """List the samples of a shard."""
    # key -> ending -> name, in the order of the shard
    members: dict[str, dict[str, str]] = {}
    extents = index_tar(path, quiet=True)
    for name in extents:
        file = PurePosixPath(name)
        # By WebDataset's rule, the ending begins at the first dot.
        stem, _, ending = file.name.partition(".")
        members.setdefault(str(file.parent / stem), {})[ending.lower()] = name
    samples: list[_Sample] = []
    for key, endings in members.items():
        image = next((name for name in endings.values() if is_image(name)), None)
        source = endings.get("cls") or endings.get("json")
        if image is None:
            # Shards may also hold samples without images.
            continue
        if source is None:
            raise UserError(
                f"{path}: {image} has no label: neither {key}.cls nor {key}.json is there"
            )
        label = _label(path, source, read_file(path, *extents[source]))
        samples.append(_Sample(image, *extents[image], label))
    return samples


def _label(path: Path, name: str, content: bytes) -> int | str:
    """Read the label from the content of the member ``name``."""
    label: object
    try:
        text = content.decode().strip()
        if name.lower().endswith("json"):
            tree = json.loads(text)
            label = next(tree[key] for key in LABEL_KEYS if key in tree)
        else:
            label = int(text) if text.isdecimal() else text
    except (ValueError, TypeError, StopIteration, RecursionError):
        label = None
    if isinstance(label, str) and label:
        return label
    # A bool is an int, but it is not a class number.
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < MAX_CLASSES:
        return label
    raise UserError(
        f"{path}: {name} holds no label; valid: a class number or name, "
        f"in .json under {' or '.join(LABEL_KEYS)}"
    )


def _classes(
    tars: tuple[Path, ...], labels: set[int | str]
) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """Return the names of the classes, and label -> number."""
    numbers = {label for label in labels if isinstance(label, int)}
    if not numbers:
        names = sorted(str(label) for label in labels)
        return tuple(names), {name: index for index, name in enumerate(names)}
    if numbers != labels:
        raise UserError(
            f"{tars[0].parent}: some labels are class numbers and others are names "
            f"({sorted(labels - numbers)[0]!r})"
        )
    file = tars[0].parent / CLASSES_FILE
    if file.is_file():
        names = file.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(names) <= max(numbers):
            raise UserError(
                f"{file}: names {len(names)} classes, but there is a label {max(numbers)}"
            )
    else:
        names = [str(number) for number in range(max(numbers) + 1)]
    return tuple(names), {number: number for number in numbers}
