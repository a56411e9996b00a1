"""A source that is a CSV file of paths, with columns path, label and, optionally, split."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import numpy as np

from pipeline.data.sources.split import FileSplit, Split
from pipeline.errors import UserError
from pipeline.recipe.schema import DataRecipe

VAL_EVERY = 10
"""Without a column split, every tenth image of a class belongs to val."""
COLUMNS = "a header with path,label or path,label,split"


def csv_of_paths(data: DataRecipe) -> Mapping[str, Split]:
    """Open the images that the CSV file ``data.path`` lists, in its order.

    Relative paths start at the file's folder. The column split says train or val; images of other
    splits are left out. Classes are the sorted labels, sorted as numbers if all of them are.

    Raises:
        UserError: there is no such file, it has other columns, a row is incomplete, or a split has
            no images.
    """
    if data.path is None:
        raise UserError(f"data.path is not set; csv needs a file with {COLUMNS}")
    path = Path(data.path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = _rows(path, file)
    except OSError as error:
        raise UserError(
            f"data.path {path}: cannot be read ({error.strerror}); csv needs a file with {COLUMNS}"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not a CSV file of UTF-8 text ({error})") from error
    for split, images in rows.items():
        if not images:
            raise UserError(
                f"{path}: lists no images of split {split}; the column split says train or val"
            )
    labels = {label for images in rows.values() for _, label in images}
    numeric = all(label.isdecimal() for label in labels)
    classes = tuple(sorted(labels, key=int) if numeric else sorted(labels))
    number = {label: index for index, label in enumerate(classes)}
    return {
        split: FileSplit(
            classes=classes,
            labels=np.array([number[label] for _, label in images], np.int64),
            fixed_size=False,
            root=path.parent,
            names=tuple(name for name, _ in images),
        )
        for split, images in rows.items()
    }


def _rows(path: Path, file: TextIO) -> dict[str, list[tuple[str, str]]]:
    """Read the rows of the CSV file: split -> (path, label) of each image."""
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "val": []}
    seen: dict[str, int] = {}
    reader = csv.DictReader(file)
    columns = reader.fieldnames or ()
    if not {"path", "label"} <= set(columns):
        raise UserError(
            f"{path}: its first line is {','.join(columns)[:80]!r}; csv needs {COLUMNS}"
        )
    for row in reader:
        image, label = row["path"], row["label"]
        if not image or not label:
            raise UserError(f"{path} line {reader.line_num}: path or label is missing")
        seen[label] = seen.get(label, 0) + 1
        if "split" in columns:
            split = row["split"]
        else:
            split = "train" if seen[label] % VAL_EVERY else "val"
        if split in rows:
            rows[split].append((image, label))
    return rows
