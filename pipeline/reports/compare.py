"""The comparison of runs: one page and one picture, each complete by itself."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from pipeline.files import write_atomically
from pipeline.reports.compared import ComparedRun, by_name, by_recipe, differences, table_rows
from pipeline.reports.figures import RecipeCurves, comparison_figure
from pipeline.reports.page import figure_html, page_html
from pipeline.tracking.charts import chart_pages

PAGE_NAME = "comparison.html"


def mlflow_pages(runs: Sequence[ComparedRun]) -> list[tuple[str, str | None]]:
    """Find MLflow's charts of the runs; see ``chart_pages``."""
    return chart_pages(
        (run.folder, run.folder.tracking_uri(run.recipe.tracking.uri)) for run in runs
    )


def write_comparison(runs: Sequence[ComparedRun], folder: Path) -> Path:
    """Write the comparison into ``folder``, as a page and as a picture in PNG and PDF.

    Returns:
        path of the page.
    """
    page = folder / PAGE_NAME
    differing = differences(runs)
    n = runs[0].grid_size
    picture = page.with_suffix(".png")
    _draw(runs, differing, picture)
    titles, *rows = table_rows(runs)
    title = f"Accuracy and localisation ({n}x{n} grids); localisation of every layer"
    parts = [_html_table(titles, rows), figure_html(title, picture)]
    if differing:
        parts.append("<h2>What differs in the recipes</h2>")
        lines = [[key, *values] for key, values in differing.items()]
        parts.append(_html_table(["", *by_name(runs)], lines))
    else:
        parts.append("<p>The recipes differ in their names only.</p>")
    for address, command in mlflow_pages(runs):
        start = f" after <code>{escape(command)}</code>" if command else ""
        parts.append(f'<p><a href="{escape(address)}">The same runs in MLflow</a>{start}</p>')
    for name, run in by_name(runs).items():
        if run.folder.sheet.is_file():
            caption = f"{name}: contributions to the strongest class of the same images"
            parts.append(figure_html(caption, run.folder.sheet))
    write_atomically(page, page_html("Comparison of runs", parts).encode())
    return page


def _draw(runs: Sequence[ComparedRun], differing: dict[str, list[str]], picture: Path) -> None:
    recipes = by_recipe(runs)
    curves = [
        RecipeCurves(name, [run.values for run in group], [run.curve for run in group if run.curve])
        for name, group in recipes.items()
    ]
    members = [[runs.index(run) for run in group] for group in recipes.values()]
    cells = {
        key: [", ".join(dict.fromkeys(values[index] for index in group)) for group in members]
        for key, values in differing.items()
    }
    comparison_figure(curves, 1 / runs[0].grid_size ** 2, cells, picture)


def _html_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>"
