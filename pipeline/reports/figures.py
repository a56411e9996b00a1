"""The figure that compares runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.evaluation.plots import CURVE_COLOURS, MARKERS, draw_depth_curves, write_figure

TABLE_COLUMNS = 6
"""Parameters in the table of a figure; a page shows all of them."""


@dataclass(frozen=True)
class RecipeCurves:
    """Runs of one recipe, with several seeds or one, in ``comparison_figure``."""

    name: str
    values: Sequence[Mapping[str, float]]
    """Values of each run, by metric name."""
    curves: Sequence[Sequence[tuple[float, float]]]
    """Points (distance, score) of each run that has a curve."""

    @property
    def points(self) -> list[tuple[float, list[float]]]:
        """Points (distance, scores of all runs), from the output on."""
        return [
            (level[0][0], [score for _, score in level])
            for level in zip(*map(sorted, self.curves), strict=True)
        ]


def comparison_figure(
    recipes: Sequence[RecipeCurves],
    chance: float,
    differences: Mapping[str, Sequence[str]],
    path: Path,
) -> None:
    """Write localisation against accuracy, localisation by layer, and a table of ``differences``.

    Args:
        recipes: the compared recipes.
        chance: localisation by chance.
        differences: by parameter, the value of each recipe.
        path: PNG file; the PDF goes beside it.
    """
    shown = dict(list(differences.items())[:TABLE_COLUMNS])
    height = 0.28 * (len(recipes) + 1) if shown else 0.0
    figure = Figure(figsize=(11.0, 4.4 + height), layout="constrained")
    (scatter, curves), (below, rest) = figure.subplots(2, 2, height_ratios=[4.4, max(height, 0.1)])
    _draw_accuracy(scatter, recipes, chance)
    _draw_layers(curves, recipes, chance)
    for axis in (below, rest):
        axis.axis("off")
    if shown:
        # The table takes the whole row.
        grid = below.get_subplotspec().get_gridspec()
        rest.remove()
        below.set_subplotspec(grid[1, :])
        _draw_table(below, recipes, shown)
    write_figure(figure, path)


def _style(index: int) -> tuple[str, str]:
    """Colour and marker of the recipe with this index."""
    return CURVE_COLOURS[index % len(CURVE_COLOURS)], MARKERS[index % len(MARKERS)]


def _draw_accuracy(axis: Axes, recipes: Sequence[RecipeCurves], chance: float) -> None:
    """Draw localisation against accuracy, at the input and at the junction of each run."""
    for index, runs in enumerate(recipes):
        colour, marker = _style(index)
        filling = {"interp/localisation": colour, "interp/localisation_junction": "none"}
        for values in runs.values:
            for name, filled in filling.items():
                if name in values and "val/top1" in values:
                    axis.scatter(
                        values["val/top1"],
                        values[name],
                        marker=marker,
                        s=60,
                        edgecolors=colour,
                        facecolors=filled,
                    )
    axis.axhline(chance, color="0.35", linestyle=":", linewidth=1.5)
    axis.set(
        xlabel="top-1 accuracy",
        ylabel="mean localisation",
        ylim=(0, 1.02),
        title="at the input (filled) and at the junction (open)",
    )
    axis.grid(color="0.9")
    axis.set_axisbelow(True)


def _draw_layers(axis: Axes, recipes: Sequence[RecipeCurves], chance: float) -> None:
    """Draw the localisation of every layer: mean and range over the seeds of each recipe."""
    means: dict[str, list[tuple[float, float]]] = {}
    for index, runs in enumerate(recipes):
        colour, _ = _style(index)
        points = [(distance, fmean(scores)) for distance, scores in runs.points]
        # A recipe without a curve keeps its entry in the legend.
        means[runs.name] = points or [(float("nan"), float("nan"))]
        if len(runs.curves) > 1:
            distances = [distance for distance, _ in runs.points]
            low = [min(scores) for _, scores in runs.points]
            high = [max(scores) for _, scores in runs.points]
            axis.fill_between(distances, low, high, color=colour, alpha=0.25, linewidth=0)
    draw_depth_curves(axis, means, chance)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _draw_table(
    axis: Axes, recipes: Sequence[RecipeCurves], differences: Mapping[str, Sequence[str]]
) -> None:
    """Draw one row for each recipe and one column for each parameter."""
    cells = [
        [runs.name, *(values[index] for values in differences.values())]
        for index, runs in enumerate(recipes)
    ]
    table = axis.table(
        cells, colLabels=["", *differences], loc="center", cellLoc="left", edges="horizontal"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.auto_set_column_width(range(len(differences) + 1))
