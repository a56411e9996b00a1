"""A CSV of paths: columns path and label, and split where the author has made one."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.data.sources.split import FileSplit, Split
from pipeline.errors import UserError
from pipeline.recipe.schema import DataRecipe

# without a column split, every tenth image of a class is one of val
VAL_EVERY = 10
COLUMNS = "a header with path,label or path,label,split"


def csv_of_paths(data: DataRecipe) -> Mapping[str, Split]:
    """Images listed in the CSV file ``data.path``, in its order. Relative paths start at its
    folder; ``split`` is train or val.

    Classes are the sorted labels, as numbers where all of them are. Images of other splits are left
    out.

    Raises:
        UserError: no such file, other columns, an incomplete row, or a split without images.
    """
    if data.path is None:
        raise UserError(f"data.path is not set; csv needs a file with {COLUMNS}")
    path = Path(data.path)
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "val": []}
    seen: dict[str, int] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
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
                split = (
                    row["split"]
                    if "split" in columns
                    else "train"
                    if seen[label] % VAL_EVERY
                    else "val"
                )
                if split in rows:
                    rows[split].append((image, label))
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
    classes = tuple(
        sorted(labels, key=int) if all(label.isdecimal() for label in labels) else sorted(labels)
    )
    number = {label: index for index, label in enumerate(classes)}
    return {
        split: FileSplit(
            classes,
            np.array([number[label] for _, label in images], np.int64),
            False,
            path.parent,
            tuple(name for name, _ in images),
        )
        for split, images in rows.items()
    }
