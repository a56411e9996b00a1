"""Evaluated runs beside each other: as text, as one page and picture for a paper or a chat, and
where MLflow shows the same runs.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from urllib.parse import quote

from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.recipe.load import load_stored
from pipeline.recipe.schema import STORED, Recipe, flatten
from pipeline.reports.figures import ComparedRuns, comparison_figure
from pipeline.reports.page import figure_html, page_html
from pipeline.reports.run import EVALUATION, PICTURES, SHEET
from pipeline.tracking.journal import JOURNAL

# of the table: metric name -> title
COLUMNS = {
    "val/top1": "top-1",
    "interp/completeness_error": "completeness error",
    "interp/localisation": "localisation: input",
    "interp/localisation_junction": "at junction",
    "interp/depth": "interpretable depth",
    "interp/area": "interpretable area",
}
# beside it comparison.png and comparison.pdf
REPORT = "comparison.html"
# keys of a recipe that say nothing of a result
_PLACES = ("name", "runs", "data.prepared", "data.path", "tracking.uri")
# In this order MLflow shows the runs of a sweep themselves, not the parent that they fold under,
# and the best first.
_CHARTS = "compareRunsMode=CHART&orderByKey=metrics.%60val%2Ftop1%60&orderByAsc=false&searchFilter="
# where `coda serve` listens
_LOCAL = "http://127.0.0.1:5000"


@dataclass(frozen=True)
class Compared:
    """An evaluated run."""

    folder: Path
    recipe: Recipe
    evaluation: dict[str, Any]
    """Of evaluation.json."""

    @property
    def curve(self) -> list[tuple[float, float]]:
        """(distance from the output, mean localisation) of the own contributions."""
        rows = self.evaluation["tables"].get("depth", [])
        return [(row["distance"], row["mean"]) for row in rows if row["method"] == "contributions"]


def find_runs(words: Sequence[str], runs: Path) -> list[Compared]:
    """The evaluated runs that ``words`` name: each a run's folder, or an experiment or sweep, whose
    runs are looked for in ``runs``.

    Raises:
        UserError: a word that names nothing, or a run's folder without an evaluation.
    """
    folders: list[Path] = []
    for word in words:
        if (Path(word) / STORED).is_file():
            folders.append(Path(word))
            continue
        stored = [
            path.parent
            for path in sorted(runs.glob(f"*/{STORED}"))
            if (path.parent / EVALUATION).is_file()
        ]
        tracking = {folder: load_stored(folder).tracking for folder in stored}
        found = [
            folder for folder, about in tracking.items() if word in (about.experiment, about.parent)
        ]
        if not found:
            known = ", ".join(sorted({about.experiment for about in tracking.values()})) or "none"
            raise UserError(
                f"{word}: is no run's folder, and {runs} holds no evaluated run of such an experiment; experiments there: {known}"
            )
        folders += found
    return [
        Compared(folder, load_stored(folder), _read(folder)) for folder in dict.fromkeys(folders)
    ]


def table(runs: Sequence[Compared]) -> str:
    """The results as aligned text."""
    rows = _rows(runs)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    n = runs[0].evaluation["grid_size"]
    return "\n".join(
        [
            *lines,
            "",
            f"Localisation: mean share in the right cell of {n}x{n} grids, chance {1 / n**2:.3f}.",
        ]
    )


def closing(runs: Sequence[Compared], page: Path | None = None) -> str:
    """What a command ends with: the results, the pictures and the ``page`` that compares them, and
    what to do next.
    """
    program, lines = _program(), [table(runs), "", pictures(runs, page), "", "Next:"]
    lines += [
        f"  {program} explain {_from_here(runs[0].folder)} IMAGE",
        "      shows what in an image speaks for and against its classes",
    ]
    for run in runs:
        if (run.folder / JOURNAL).is_file() and not (run.folder / "run_id").is_file():
            lines += [
                f"  {program} sync {_from_here(run.folder)}",
                "      sends this run to MLflow, which does not have it yet",
            ]
    # which `coda serve` finds by itself
    own = f"sqlite:///{Path('runs').resolve() / 'mlflow.db'}"
    for address, command in mlflow_views(runs):
        charts = f"the charts of {'these runs' if len(runs) > 1 else 'this run'}"
        if command:
            start = command.removeprefix("coda").removesuffix(f" --backend-store-uri {own}")
            lines += [
                f"  {program}{start}",
                f"      starts MLflow, which then shows {charts} at",
                f"      {address}",
            ]
        else:
            lines += [f"  see {charts} in MLflow", f"      {address}"]
    return "\n".join(lines)


def pictures(runs: Sequence[Compared], page: Path | None = None) -> str:
    """Where the pictures of the runs lie, and the page that compares them, as text."""
    shown = [path for run in runs for path in sorted((run.folder / PICTURES).glob("*.png"))]
    if page:
        shown = [page, page.with_suffix(".png"), *shown]
    return "\n".join(["Pictures:", *(f"  {_from_here(path)}" for path in shown)])


def _program() -> str:
    """What to type for ``coda`` in this shell: a virtual environment need not be on the PATH."""
    installed = Path(sys.executable).with_name("coda")
    return "coda" if shutil.which("coda") or not installed.is_file() else str(_from_here(installed))


def _from_here(path: Path) -> Path:
    """``path`` as one would type it in the current folder."""
    path, here = Path(os.path.abspath(path)), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def differences(runs: Sequence[Compared]) -> dict[str, list[str]]:
    """By key of the recipe, the values of all runs, where they differ."""
    flat = [flatten(run.recipe.to_dict()) for run in runs]
    keys = [
        key for key in dict.fromkeys(key for values in flat for key in values) if key not in _PLACES
    ]
    found = {
        key: [json.dumps(values[key]).strip('"') if key in values else "-" for values in flat]
        for key in keys
    }
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def mlflow_views(runs: Sequence[Compared]) -> list[tuple[str, str | None]]:
    """(address of MLflow's charts of these runs, command that starts its server if none is known),
    one for each store that has some.
    """
    views = []
    sent = [
        run
        for run in runs
        if (run.folder / "run_id").is_file() and (run.folder / "experiment_id").is_file()
    ]
    for uri, group in groupby(
        sorted(sent, key=lambda run: run.recipe.tracking_uri),
        key=lambda run: run.recipe.tracking_uri,
    ):
        members = list(group)
        ids = ", ".join(f"'{(run.folder / 'run_id').read_text()}'" for run in members)
        experiments = sorted({(run.folder / "experiment_id").read_text() for run in members})
        served = uri.startswith(("http://", "https://"))
        page = (
            f"experiments/{experiments[0]}/runs?"
            if len(experiments) == 1
            else f"compare-experiments/s?experiments={_json(experiments)}&"
        )
        address = f"{uri.rstrip('/') if served else _LOCAL}/#/{page}{_CHARTS}{quote(f'attributes.run_id IN ({ids})')}"
        views.append((address, None if served else f"coda serve --backend-store-uri {uri}"))
    return views


def report(runs: Sequence[Compared], folder: Path) -> Path:
    """Write the comparison into ``folder``: a page that holds all it shows, and its picture as PNG
    and PDF; returns the page.
    """
    picture, differing, n = (
        folder / Path(REPORT).with_suffix(".png"),
        differences(runs),
        runs[0].evaluation["grid_size"],
    )
    recipes = _by_recipe(runs)
    compared = [
        ComparedRuns(
            name,
            [run.evaluation["values"] for run in group],
            [run.curve for run in group if run.curve],
        )
        for name, group in recipes.items()
    ]
    places = [[runs.index(run) for run in group] for group in recipes.values()]
    by_recipe = {
        key: [", ".join(dict.fromkeys(values[i] for i in group)) for group in places]
        for key, values in differing.items()
    }
    comparison_figure(compared, 1 / n**2, by_recipe, picture)
    titles, *rows = _rows(runs)
    parts = [
        _html_table(titles, rows),
        figure_html(
            f"Accuracy and localisation ({n}x{n} grids); localisation of every layer", picture
        ),
        "<h2>What differs in the recipes</h2>"
        if differing
        else "<p>The recipes differ in their names only.</p>",
        _html_table(["", *_named(runs)], [[key, *values] for key, values in differing.items()])
        if differing
        else "",
    ]
    for address, command in mlflow_views(runs):
        start = f" after <code>{escape(command)}</code>" if command else ""
        parts.append(f'<p><a href="{escape(address)}">The same runs in MLflow</a>{start}</p>')
    for name, run in _named(runs).items():
        if (sheet := run.folder / PICTURES / SHEET).is_file():
            parts.append(
                figure_html(
                    f"{name}: contributions to the strongest class of the same images", sheet
                )
            )
    write_atomically(folder / REPORT, page_html("Comparison of runs", parts).encode())
    return folder / REPORT


def _named(runs: Sequence[Compared]) -> dict[str, Compared]:
    """Runs by name, or by folder where two have one name."""
    names = [run.recipe.name for run in runs]
    return {
        name if names.count(name) == 1 else str(run.folder): run
        for name, run in zip(names, runs, strict=True)
    }


def _by_recipe(runs: Sequence[Compared]) -> dict[str, list[Compared]]:
    """Runs whose recipes differ in nothing but the seed and the names, under the name of the first."""
    groups: dict[str, dict[str, Compared]] = {}
    for name, run in _named(runs).items():
        settings = {
            key: value
            for key, value in flatten(run.recipe.to_dict()).items()
            if key not in (*_PLACES, "seed")
        }
        groups.setdefault(json.dumps(settings, sort_keys=True), {})[name] = run
    return {
        next(iter(group)) + (f" and {len(group) - 1} more" if len(group) > 1 else ""): list(
            group.values()
        )
        for group in groups.values()
    }


def _rows(runs: Sequence[Compared]) -> list[list[str]]:
    """Titles; the values of every run; their mean and standard deviation where only seeds differ."""
    rows = [["run", *COLUMNS.values()]]
    rows += [[name, *(_cell(key, [run]) for key in COLUMNS)] for name, run in _named(runs).items()]
    return rows + [
        [name, *(_cell(key, group) for key in COLUMNS)]
        for name, group in _by_recipe(runs).items()
        if len(group) > 1
    ]


def _html_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / EVALUATION).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: has no readable {EVALUATION}; `coda evaluate {folder}` makes it"
        ) from error


def _cell(name: str, runs: Sequence[Compared]) -> str:
    """A metric of a run, or its mean and standard deviation over several."""
    values = [run.evaluation["values"].get(name) for run in runs]
    if None in values:
        return "-"
    figures = ".1e" if name == "interp/completeness_error" else ".4f"
    return format(fmean(values), figures) + (
        f" ± {stdev(values):{figures}}" if len(values) > 1 else ""
    )


def _json(value: object) -> str:
    return quote(json.dumps(value, separators=(",", ":")))
