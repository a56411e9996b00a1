"""Evaluated runs: how they are found, grouped by recipe, and laid out in a table."""

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

PLACES = ("name", "runs", "data.prepared", "data.path", "tracking.uri")
"""Keys of a recipe that do not decide a result."""


@dataclass(frozen=True)
class ComparedRun:
    """An evaluated run."""

    folder: RunFolder
    recipe: Recipe
    evaluation: dict[str, Any]
    """Of evaluation.json."""

    @property
    def values(self) -> dict[str, float]:
        """By metric name."""
        return self.evaluation["values"]

    @property
    def grid_size(self) -> int:
        """Side of the grids, in images, of the localisation."""
        return self.evaluation["grid_size"]

    @property
    def curve(self) -> list[tuple[float, float]]:
        """(distance from the output, mean localisation) of the network's own contributions."""
        rows = self.evaluation["tables"].get("depth", [])
        return [(row["distance"], row["mean"]) for row in rows if row["method"] == OWN]


def open_run(folder: RunFolder) -> ComparedRun:
    """Read what is compared of a run.

    Raises:
        UserError: it has no evaluation, or no valid recipe.
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
        words: each a run's folder, or an experiment or sweep.
        runs: where the runs of experiments and sweeps are looked for.

    Raises:
        UserError: a word that names nothing, or a run's folder without an evaluation.
    """
    found: list[RunFolder] = []
    for word in words:
        folder = RunFolder(Path(word))
        found += [folder] if folder.recipe.is_file() else _members(word, runs)
    return [open_run(folder) for folder in dict.fromkeys(found)]


def _members(word: str, runs: Path) -> list[RunFolder]:
    """The evaluated runs in ``runs`` of an experiment or sweep."""
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
    """Runs by name, or by folder where two have one name."""
    names = [run.recipe.name for run in runs]
    return {
        name if names.count(name) == 1 else str(run.folder): run
        for name, run in zip(names, runs, strict=True)
    }


def by_recipe(runs: Sequence[ComparedRun]) -> dict[str, list[ComparedRun]]:
    """Group runs whose recipes differ in seed and names only, under the name of the first."""
    groups: dict[str, dict[str, ComparedRun]] = {}
    for name, run in by_name(runs).items():
        keys = flatten(run.recipe.to_dict())
        settings = {key: value for key, value in keys.items() if key not in (*PLACES, "seed")}
        groups.setdefault(json.dumps(settings, sort_keys=True), {})[name] = run
    named = {}
    for group in groups.values():
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        named[next(iter(group)) + more] = list(group.values())
    return named


def differences(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """By key of the recipe, the values of all runs, where they differ."""
    flat = [flatten(run.recipe.to_dict()) for run in runs]
    found = {}
    for key in dict.fromkeys(key for keys in flat for key in keys):
        shown = [json.dumps(keys[key]).strip('"') if key in keys else "-" for keys in flat]
        if key not in PLACES and len(set(shown)) > 1:
            found[key] = shown
    return found


def table_rows(runs: Sequence[ComparedRun]) -> list[list[str]]:
    """Titles, the values of each run, and mean and standard deviation where only seeds differ."""
    columns = {
        name: column for metric in METRICS.values() for name, column in metric.columns.items()
    }
    groups = {name: [run] for name, run in by_name(runs).items()}
    rows = [["run", *(column.title for column in columns.values())]]
    for name, group in [
        *groups.items(),
        *((name, group) for name, group in by_recipe(runs).items() if len(group) > 1),
    ]:
        cells = [_cell(key, column.format, group) for key, column in columns.items()]
        rows.append([name, *cells])
    return rows


def _cell(name: str, form: str, runs: Sequence[ComparedRun]) -> str:
    """A value of a run, or its mean and standard deviation over several."""
    values = [run.values[name] for run in runs if name in run.values]
    if len(values) < len(runs):
        return "-"
    spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return format(fmean(values), form) + spread
