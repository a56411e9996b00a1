"""WebDataset shards: tar files in which files of one name and several endings make a sample
(0001.jpg and 0001.cls or 0001.json).
"""

import glob
import json
import multiprocessing
import re
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from pipeline.data.images import is_image, read_file
from pipeline.data.sources.archive import index_tar
from pipeline.data.sources.split import Split, TarSplit
from pipeline.errors import UserError
from pipeline.recipe.schema import DataRecipe

# in a shard's name -> its split
WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}
MAX_CLASSES = 1 << 20
# of a .json
LABEL_KEYS = ("label", "cls")
# beside the shards: names of the classes 0, 1, ..., one a line
CLASSES = "classes.txt"
# name, offset, length, label
Sample = tuple[str, int, int, int | str]


def webdataset(data: DataRecipe) -> Mapping[str, Split]:
    """Shards that ``data.path`` names: a folder, or a pattern with wildcards or braces, such as
    ``/data/{train,val}-{000..099}.tar``.

    A shard belongs to the split that a word in its name says, or else its folder's name is: train;
    val, valid, validation or test. The label is the text of <key>.cls, or ``label`` or ``cls`` in
    <key>.json: class numbers, or names that are then sorted.

    Raises:
        UserError: shards are missing, damaged, of no split, with dangerous members, or a sample is
            incomplete.
    """
    shards = _shards(data)
    samples: dict[str, list[tuple[int, Sample]]] = {"train": [], "val": []}
    tars = tuple(path for path, _ in shards)
    try:
        with ProcessPoolExecutor(
            min(data.workers, len(tars)), multiprocessing.get_context("fork")
        ) as pool:
            found = tqdm(
                pool.map(_samples, tars), "indexing shards", len(tars), leave=False, unit="shard"
            )
            for number, ((_, split), result) in enumerate(zip(shards, found, strict=True)):
                samples[split] += [(number, sample) for sample in result]
    except BrokenProcessPool as error:
        raise UserError(
            f"data.path {data.path}: a process that indexed shards was killed, often for want of memory"
        ) from error
    for split, chosen in samples.items():
        if not chosen:
            raise UserError(f"data.path {data.path}: its shards of split {split} hold no images")
    classes, number_of = _classes(
        tars, {sample[3] for chosen in samples.values() for _, sample in chosen}
    )
    return {
        split: TarSplit(
            classes,
            np.array([number_of[label] for _, (*_, label) in chosen], np.int64),
            False,
            tars,
            tuple(name for _, (name, *_) in chosen),
            np.array([(tar, offset, length) for tar, (_, offset, length, _) in chosen], np.int64),
        )
        for split, chosen in samples.items()
    }


def _shards(data: DataRecipe) -> list[tuple[Path, str]]:
    from braceexpand import braceexpand

    if data.path is None:
        raise UserError(
            "data.path is not set; webdataset needs a folder of tar shards, or a pattern such as shards/{train,val}-*.tar"
        )
    path = Path(data.path)
    if path.is_dir():
        paths = sorted([*path.glob("*.tar"), *path.glob("*/*.tar")])
    else:
        paths = []
        try:
            # one by one: braces can say more than memory holds
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
    words = {WORDS[word] for word in re.split("[^a-z]+", shard.name.lower()) if word in WORDS} or {
        WORDS.get(shard.parent.name.lower(), "")
    }
    if words <= {"train", "val"} and len(words) == 1:
        return words.pop()
    raise UserError(
        f"{shard}: neither its name nor its folder says train or val; rename it, or choose others with data.path"
    )


def _samples(path: Path) -> list[Sample]:
    # key -> ending -> name, in the order of the shard
    members: dict[str, dict[str, str]] = {}
    extents = index_tar(path, quiet=True)
    for name in extents:
        file = PurePosixPath(name)
        # WebDataset's rule: the ending begins at the first dot
        stem, _, ending = file.name.partition(".")
        members.setdefault(str(file.parent / stem), {})[ending.lower()] = name
    samples: list[Sample] = []
    for key, endings in members.items():
        image = next((name for name in endings.values() if is_image(name)), None)
        source = endings.get("cls") or endings.get("json")
        if image is None:
            # shards may hold other samples, too
            continue
        if source is None:
            raise UserError(
                f"{path}: {image} has no label: neither {key}.cls nor {key}.json is there"
            )
        samples.append(
            (image, *extents[image], _label(path, source, read_file(path, *extents[source])))
        )
    return samples


def _label(path: Path, name: str, content: bytes) -> int | str:
    try:
        text = content.decode().strip()
        if name.lower().endswith("json"):
            tree = json.loads(text)
            label = next(tree[key] for key in LABEL_KEYS if key in tree)
        else:
            label = int(text) if text.isdecimal() else text
    except (ValueError, TypeError, StopIteration, RecursionError):
        label = None
    valid = 0 <= label < MAX_CLASSES if type(label) is int else isinstance(label, str) and label
    if not valid:
        raise UserError(
            f"{path}: {name} holds no label; valid: a class number or name, in .json under {' or '.join(LABEL_KEYS)}"
        )
    return label


def _classes(
    tars: tuple[Path, ...], labels: set[int | str]
) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """Names of the classes, and label -> number."""
    numbers = {label for label in labels if isinstance(label, int)}
    if not numbers:
        names = sorted(str(label) for label in labels)
        return tuple(names), {name: index for index, name in enumerate(names)}
    if numbers != labels:
        raise UserError(
            f"{tars[0].parent}: some labels are class numbers and others are names ({sorted(labels - numbers)[0]!r})"
        )
    file = tars[0].parent / CLASSES
    if file.is_file():
        names = file.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(names) <= max(numbers):
            raise UserError(
                f"{file}: names {len(names)} classes, but there is a label {max(numbers)}"
            )
    else:
        names = [str(number) for number in range(max(numbers) + 1)]
    return tuple(names), {number: number for number in numbers}
