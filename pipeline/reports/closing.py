"""The closing words of `coda train`, `evaluate` and `compare`: results, and what to do next."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.reports.compare import mlflow_pages
from pipeline.reports.compared import ComparedRun, table_rows


def closing(runs: Sequence[ComparedRun], page: Path | None = None) -> str:
    """Text of the results, the pictures, the ``page`` that compares the runs, and what is next."""
    program = _program()
    lines = [table(runs), "", _pictures(runs, page), "", "Next:"]
    lines.append(f"  {program} explain {_from_here(runs[0].folder.path)} IMAGE")
    lines.append("      shows what in an image speaks for and against its classes")
    for run in runs:
        if run.folder.journal.is_file() and not run.folder.run_id.is_file():
            lines.append(f"  {program} sync {_from_here(run.folder.path)}")
            lines.append("      sends this run to MLflow, which does not have it yet")
    # `coda serve` finds this store by itself.
    own = f" --backend-store-uri sqlite:///{Path('runs').resolve() / 'mlflow.db'}"
    for address, command in mlflow_pages(runs):
        charts = f"the charts of {'these runs' if len(runs) > 1 else 'this run'}"
        if command:
            lines.append(f"  {program}{command.removeprefix('coda').removesuffix(own)}")
            lines.append(f"      starts MLflow, which then shows {charts} at")
        else:
            lines.append(f"  see {charts} in MLflow")
        lines.append(f"      {address}")
    return "\n".join(lines)


def table(runs: Sequence[ComparedRun]) -> str:
    """The results as aligned text."""
    rows = table_rows(runs)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    n = runs[0].grid_size
    note = f"Localisation: mean share in the right cell of {n}x{n} grids, chance {1 / n**2:.3f}."
    return "\n".join([*lines, "", note])


def _pictures(runs: Sequence[ComparedRun], page: Path | None) -> str:
    shown = [path for run in runs for path in run.folder.all_pictures()]
    if page:
        shown = [page, page.with_suffix(".png"), *shown]
    return "\n".join(["Pictures:", *(f"  {_from_here(path)}" for path in shown)])


def _program() -> str:
    """Command to type for ``coda`` in this shell: its virtual environment may not be on PATH."""
    installed = Path(sys.executable).with_name("coda")
    return "coda" if shutil.which("coda") or not installed.is_file() else str(_from_here(installed))


def _from_here(path: Path) -> Path:
    """``path`` as one would type it in the current folder."""
    path = Path(os.path.abspath(path))
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
