"""Evaluated runs: finding them, grouping them by recipe, and laying them out in a table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.metric import OWN
from pipeline.evaluation.metrics import METRICS
from pipeline.recipe.load import load_stored
from pipeline.recipe.schema import Recipe, flatten
from pipeline.run_folder import RunFolder

NAMES_AND_PLACES = ("name", "runs", "data.prepared", "data.path", "tracking.uri")
"""Keys of a recipe that do not decide a result."""


@dataclass(frozen=True)
class ComparedRun:
    """An evaluated run."""

    folder: RunFolder
    recipe: Recipe
    evaluation: dict[str, Any]
    """Content of evaluation.json."""

    @property
    def values(self) -> dict[str, float]:
        """Values by metric name."""
        values: dict[str, float] = self.evaluation["values"]
        return values

    @property
    def grid_size(self) -> int:
        """Side, in images, of the grids on which localisation was measured."""
        return int(self.evaluation["grid_size"])

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Points (distance from the output, mean localisation) of the network's contributions."""
        rows = self.evaluation["tables"].get("depth", [])
        return [(row["distance"], row["mean"]) for row in rows if row["method"] == OWN]


def open_run(folder: RunFolder) -> ComparedRun:
    """Read the recipe and the evaluation of a run.

    Raises:
        UserError: the run has no evaluation, or no valid recipe.
    """
    try:
        evaluation = json.loads(folder.evaluation.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: has no readable {folder.evaluation.name}; `coda evaluate {folder}` makes it"
        ) from error
    return ComparedRun(folder, load_stored(folder.path), evaluation)


def find_runs(words: Sequence[str], runs: Path) -> list[ComparedRun]:
    """Find the evaluated runs that ``words`` name.

    Args:
        words: each the folder of a run, or the name of an experiment or sweep.
        runs: folder in which the runs of experiments and sweeps are looked for.

    Raises:
        UserError: a word names nothing, or a run that has no evaluation.
    """
    found: list[RunFolder] = []
    for word in words:
        folder = RunFolder(Path(word))
        found += [folder] if folder.recipe.is_file() else _members(word, runs)
    return [open_run(folder) for folder in dict.fromkeys(found)]


def _members(word: str, runs: Path) -> list[RunFolder]:
    """Find the evaluated runs in ``runs`` of the experiment or sweep ``word``."""
    folders = [RunFolder(path) for path in sorted(runs.glob("*"))]
    stored = [each for each in folders if each.recipe.is_file() and each.evaluation.is_file()]
    tracking = {folder: load_stored(folder.path).tracking for folder in stored}
    found = [each for each, keys in tracking.items() if word in (keys.experiment, keys.parent)]
    if not found:
        known = ", ".join(sorted({keys.experiment for keys in tracking.values()})) or "none"
        raise UserError(
            f"{word}: is not a run's folder, and {runs} holds no evaluated run of such an "
            f"experiment; experiments there: {known}"
        )
    return found


def by_name(runs: Sequence[ComparedRun]) -> dict[str, ComparedRun]:
    """Runs by name, or by folder where several share a name."""
    names = [run.recipe.name for run in runs]
    return {
        name if names.count(name) == 1 else str(run.folder): run
        for name, run in zip(names, runs, strict=True)
    }


def by_recipe(runs: Sequence[ComparedRun]) -> dict[str, list[ComparedRun]]:
    """Group runs whose recipes differ in seed and names only, under the name of the first."""
    ignored = (*NAMES_AND_PLACES, "seed")
    groups: dict[str, dict[str, ComparedRun]] = {}
    for name, run in by_name(runs).items():
        keys = flatten(run.recipe.to_dict())
        settings = {key: value for key, value in keys.items() if key not in ignored}
        groups.setdefault(json.dumps(settings, sort_keys=True), {})[name] = run
    named = {}
    for group in groups.values():
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        named[next(iter(group)) + more] = list(group.values())
    return named


def differences(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """Values of all runs, in order, by each key of the recipe in which the runs differ."""
    flat = [flatten(run.recipe.to_dict()) for run in runs]
    found = {}
    for key in dict.fromkeys(key for keys in flat for key in keys):
        shown = [json.dumps(keys[key]).strip('"') if key in keys else "-" for keys in flat]
        if key not in NAMES_AND_PLACES and len(set(shown)) > 1:
            found[key] = shown
    return found


def table_rows(runs: Sequence[ComparedRun]) -> list[list[str]]:
    """Titles, the values of each run, and means with deviations where only seeds differ."""
    columns = {
        name: column for metric in METRICS.values() for name, column in metric.columns.items()
    }
    single = [(name, [run]) for name, run in by_name(runs).items()]
    repeated = [(name, group) for name, group in by_recipe(runs).items() if len(group) > 1]
    rows = [["run", *(column.title for column in columns.values())]]
    for name, group in [*single, *repeated]:
        cells = [_cell(key, column.format, group) for key, column in columns.items()]
        rows.append([name, *cells])
    return rows


def _cell(name: str, form: str, runs: Sequence[ComparedRun]) -> str:
    """Value of one run, or mean and standard deviation over several, in the format ``form``."""
    values = [run.values[name] for run in runs if name in run.values]
    if len(values) < len(runs):
        return "-"
    spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return format(fmean(values), form) + spread
