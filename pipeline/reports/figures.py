"""Figures of the metrics' tables: localisation of methods, pixel removal curves, alignment of
layers. PNG for the screen, PDF for print.

After the figures of Böhle, Fritz, Schiele, arXiv 2109.13004. Each function takes the rows that the
metric of its name made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.reports.plots import (
    CURVE_COLOURS,
    MARKERS,
    depth_curves,
    draw_depth_curves,
    write_figure,
)

Row = Mapping[str, str | float | int]
# of parameters in a figure; a page shows all of them
TABLE_COLUMNS = 6
FIRST = {
    "least": "least important first (higher is better)",
    "most": "most important first (lower is better)",
}


def localisation_figure(rows: Sequence[Row], chance: float, path: Path) -> None:
    """One bar from quartile to quartile for each method, best median on top; a line at the median,
    a dot at the mean.
    """
    ordered = sorted(rows, key=lambda row: row["median"])
    names = [f"{row['method']}\n({row['layer']})" for row in ordered]
    _quartiles(
        ordered, names, (0, 1.02), "share of positive contributions in the right cell", chance, path
    )


def alignment_figure(rows: Sequence[Row], path: Path) -> None:
    """One bar from quartile to quartile of cos(w, x) for each DAU layer, the output on top."""
    _quartiles(
        rows[::-1],
        [str(row["layer"]) for row in rows[::-1]],
        (-1.02, 1.02),
        "cos(w, x): alignment of weight and input",
        0.0,
        path,
    )


def depth_figure(rows: Sequence[Row], chance: float, path: Path) -> None:
    """Mean localisation against distance from the output, one curve for each method."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(str(row["method"]), []).append(
            (float(row["distance"]), float(row["mean"]))
        )
    depth_curves(curves, chance, path)


def removal_figure(rows: Sequence[Row], path: Path) -> None:
    """Mean probability of the true class against the share of pixels removed, one curve for each
    method.
    """
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    for axis, (first, title) in zip(figure.subplots(1, 2, sharey=True), FIRST.items(), strict=True):
        for index, method in enumerate(methods):
            points = [
                (100 * float(r["removed"]), float(r["probability"]))
                for r in rows
                if (r["method"], r["first"]) == (method, first)
            ]
            style = dict(
                color=CURVE_COLOURS[index % len(CURVE_COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
            )
            style["linestyle"] = "-" if index < len(CURVE_COLOURS) else "--"
            axis.plot(
                *zip(*points, strict=True),
                markevery=max(1, len(points) // 8),
                label=method,
                **style,
            )
        axis.set(title=title, xlabel="pixels removed (%)", ylim=(0, 1.02))
        axis.grid(color="0.9")
    figure.axes[0].set_ylabel("probability of the true class")
    figure.axes[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    write_figure(figure, path)


@dataclass(frozen=True)
class ComparedRuns:
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
    recipes: Sequence[ComparedRuns],
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


def _quartiles(
    rows: Sequence[Row],
    names: Sequence[str],
    limits: tuple[float, float],
    label: str,
    neutral: float,
    path: Path,
) -> None:
    figure = Figure(figsize=(7.0, 1.1 + 0.45 * len(rows)), layout="constrained")
    axis: Axes = figure.subplots()
    low, middle, high, mean = (
        [float(row[key]) for row in rows] for key in ("q25", "median", "q75", "mean")
    )
    places = range(len(rows))
    axis.barh(
        places,
        [b - a for a, b in zip(low, high, strict=True)],
        left=low,
        height=0.55,
        color="#56B4E9",
        label="quartiles",
    )
    axis.scatter(
        middle, places, marker="|", s=260, linewidths=2.5, color="black", label="median", zorder=3
    )
    axis.scatter(
        mean, places, marker="o", s=28, color="#D55E00", edgecolors="white", label="mean", zorder=3
    )
    axis.axvline(
        neutral,
        color="0.35",
        linestyle=":",
        linewidth=1.5,
        label=f"chance {neutral:.3g}" if neutral else "no alignment",
    )
    axis.set(xlim=limits, xlabel=label, yticks=list(places), ylim=(-0.6, len(rows) - 0.4))
    axis.set_yticklabels(names, fontsize=8)
    axis.grid(color="0.9", axis="x")
    axis.set_axisbelow(True)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    write_figure(figure, path)
