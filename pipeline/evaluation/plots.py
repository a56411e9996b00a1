"""Plots of the metrics' rows, as PNG for the screen and as PDF for print.

After the figures of Böhle, Fritz, Schiele, arXiv 2109.13004.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.errors import UserError
from pipeline.evaluation.metric import Row
from pipeline.files import write_atomically

CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of Okabe and Ito, told apart by colour-blind readers."""

MARKERS = "osD^vP*X"

Points = Iterable[tuple[float, float]]
"""Points (x, y) of a curve, in any order."""


def depth_curves(
    curves: Mapping[str, Points],
    chance: float,
    path: str | Path,
    *,
    threshold: float = 0.5,
) -> None:
    """Write the mean localisation of each layer against its distance from the output.

    Args:
        curves: by name, (distance, score) points in any order.
        chance: score of an uninformative map, 1 / n².
        path: PNG file, replaced in one step when it is complete; the PDF goes beside it.
        threshold: drawn as a line; the interpretable depth is where a curve last reaches it.

    Raises:
        UserError: the file cannot be written.
    """
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    draw_depth_curves(figure.subplots(), curves, chance, threshold)
    figure.axes[0].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    write_figure(figure, path)


def draw_depth_curves(
    axis: Axes,
    curves: Mapping[str, Points],
    chance: float,
    threshold: float = 0.5,
) -> None:
    """Draw the curves of ``depth_curves``, without a legend, on an axis of a larger figure."""
    for index, (name, points) in enumerate(curves.items()):
        distances, scores = zip(*sorted(points), strict=True)
        colour, marker = CURVE_COLOURS[index % len(CURVE_COLOURS)], MARKERS[index % len(MARKERS)]
        axis.plot(distances, scores, color=colour, marker=marker, markersize=6, label=name)
    axis.axhline(
        threshold, color="0.35", linestyle="--", linewidth=1, label=f"threshold {threshold:g}"
    )
    axis.axhline(chance, color="0.35", linestyle=":", linewidth=1.5, label=f"chance {chance:.3g}")
    axis.set(xlim=(-0.02, 1.02), ylim=(0, 1.02), ylabel="mean localisation")
    axis.set_xlabel("distance from the output (share of parametric layers; 1 is the input)")
    axis.grid(color="0.9")


def removal_curves(
    panels: Sequence[tuple[str, Mapping[str, Sequence[tuple[float, float]]]]], path: Path
) -> None:
    """Write one panel for each order of removal, with a curve for each method.

    Args:
        panels: (title, curves by method); a curve has points (pixels removed in %, probability).
        path: PNG file; the PDF goes beside it.
    """
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for index, (method, points) in enumerate(curves.items()):
            axis.plot(
                *zip(*points, strict=True),
                markevery=max(1, len(points) // 8),
                label=method,
                color=CURVE_COLOURS[index % len(CURVE_COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
                linestyle="-" if index < len(CURVE_COLOURS) else "--",
            )
        axis.set(title=title, xlabel="pixels removed (%)", ylim=(0, 1.02))
        axis.grid(color="0.9")
    figure.axes[0].set_ylabel("probability of the true class")
    figure.axes[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    write_figure(figure, path)


def quartile_bars(
    rows: Sequence[Row],
    names: Sequence[str],
    limits: tuple[float, float],
    label: str,
    neutral: float,
    path: Path,
) -> None:
    """Write one bar from quartile to quartile for each row, with its median and mean.

    Args:
        rows: with the columns ``q25``, ``median``, ``q75`` and ``mean``, from bottom to top.
        names: one for each row.
        limits: least and greatest value shown.
        label: title of the values.
        neutral: value of an uninformative map, drawn as a line.
        path: PNG file; the PDF goes beside it.
    """
    figure = Figure(figsize=(7.0, 1.1 + 0.45 * len(rows)), layout="constrained")
    axis: Axes = figure.subplots()
    _draw_quartiles(axis, rows)
    meaning = f"chance {neutral:.3g}" if neutral else "no alignment"
    axis.axvline(neutral, color="0.35", linestyle=":", linewidth=1.5, label=meaning)
    axis.set(xlim=limits, xlabel=label, yticks=range(len(rows)), ylim=(-0.6, len(rows) - 0.4))
    axis.set_yticklabels(names, fontsize=8)
    axis.grid(color="0.9", axis="x")
    axis.set_axisbelow(True)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    write_figure(figure, path)


def _draw_quartiles(axis: Axes, rows: Sequence[Row]) -> None:
    """Draw the bar, median and mean of each row."""
    low = _column(rows, "q25")
    widths = [upper - lower for lower, upper in zip(low, _column(rows, "q75"), strict=True)]
    places = range(len(rows))
    axis.barh(places, widths, left=low, height=0.55, color="#56B4E9", label="quartiles")
    axis.scatter(
        _column(rows, "median"),
        places,
        marker="|",
        s=260,
        linewidths=2.5,
        color="black",
        label="median",
        zorder=3,
    )
    axis.scatter(
        _column(rows, "mean"),
        places,
        marker="o",
        s=28,
        color="#D55E00",
        edgecolors="white",
        label="mean",
        zorder=3,
    )


def _column(rows: Sequence[Row], key: str) -> list[float]:
    return [float(row[key]) for row in rows]


def write_figure(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` to the PNG file ``path`` and, for print, beside it as PDF."""
    write_picture(figure, path)
    write_picture(figure, Path(path).with_suffix(".pdf"))


def write_picture(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` to the PDF or PNG file ``path``, replaced in one step.

    Raises:
        UserError: the file cannot be written.
    """
    picture = io.BytesIO()
    form = "pdf" if Path(path).suffix == ".pdf" else "png"
    # Without date and version, the same numbers give the same file.
    stamps = {"pdf": {"CreationDate": None}, "png": {"Software": None}}
    figure.savefig(picture, format=form, dpi=150, metadata=stamps[form])
    try:
        write_atomically(Path(path), picture.getvalue())
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror}") from error
