"""The figure that compares runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from pipeline.evaluation.plots import CURVE_COLOURS, MARKERS, draw_depth_curves, write_figure

# of parameters in a figure; a page shows all of them
TABLE_COLUMNS = 6


@dataclass(frozen=True)
class RecipeCurves:
    """Runs of one recipe, with several seeds or one, in ``comparison_figure``."""

    name: str
    values: Sequence[Mapping[str, float]]
    """Of each run, by metric name."""
    curves: Sequence[Sequence[tuple[float, float]]]
    """Of each run that has one, (distance, score) points."""

    @property
    def points(self) -> list[tuple[float, list[float]]]:
        """(distance, scores of all runs), from the output on."""
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
    """Localisation against accuracy; localisation of every layer, mean and range of the seeds; and
    a table of ``differences``.

    Args:
        recipes: what is compared.
        chance: localisation by chance.
        differences: by parameter, the value of each recipe.
        path: of the PNG; the PDF goes beside it.
    """
    shown = dict(list(differences.items())[:TABLE_COLUMNS])
    height = 0.28 * (len(recipes) + 1) if shown else 0.0
    figure = Figure(figsize=(11.0, 4.4 + height), layout="constrained")
    (scatter, curves), (below, rest) = figure.subplots(2, 2, height_ratios=[4.4, max(height, 0.1)])
    means: dict[str, list[tuple[float, float]]] = {}
    for index, runs in enumerate(recipes):
        colour, marker = CURVE_COLOURS[index % len(CURVE_COLOURS)], MARKERS[index % len(MARKERS)]
        for values, (place, filled) in product(runs.values, (("", True), ("_junction", False))):
            value = values.get(f"interp/localisation{place}")
            if value is not None and "val/top1" in values:
                scatter.scatter(
                    values["val/top1"],
                    value,
                    marker=marker,
                    s=60,
                    edgecolors=colour,
                    facecolors=colour if filled else "none",
                )
        means[runs.name] = [(distance, fmean(scores)) for distance, scores in runs.points] or [
            (float("nan"), float("nan"))
        ]
        ranges = [(distance, min(scores), max(scores)) for distance, scores in runs.points]
        if len(runs.curves) > 1:
            curves.fill_between(*zip(*ranges, strict=True), color=colour, alpha=0.25, linewidth=0)
    scatter.axhline(chance, color="0.35", linestyle=":", linewidth=1.5)
    scatter.set(
        xlabel="top-1 accuracy",
        ylabel="mean localisation",
        ylim=(0, 1.02),
        title="at the input (filled) and at the junction (open)",
    )
    scatter.grid(color="0.9")
    scatter.set_axisbelow(True)
    draw_depth_curves(curves, means, chance)
    curves.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    for axis in (below, rest):
        axis.axis("off")
    if shown:
        grid = below.get_subplotspec().get_gridspec()
        rest.remove()
        below.set_subplotspec(grid[1, :])
        cells = [
            [runs.name, *(values[index] for values in shown.values())]
            for index, runs in enumerate(recipes)
        ]
        table = below.table(
            cells, colLabels=["", *shown], loc="center", cellLoc="left", edges="horizontal"
        )
        table.auto_set_font_size(False)
        table.set_fontsize(8)
        table.auto_set_column_width(range(len(shown) + 1))
    write_figure(figure, path)
