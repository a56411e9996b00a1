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
Curve = Iterable[tuple[float, float]]


def depth_curves(
    curves: Mapping[str, Iterable[tuple[float, float]]],
    chance: float,
    path: str | Path,
    *,
    threshold: float = 0.5,
) -> None:
    """Write the mean localisation of each layer's contributions against the layer's distance from
    the output; PNG and PDF.

    Args:
        curves: by name, (distance, score) points in any order.
        chance: score of an uninformative map, 1 / n².
        path: PNG file, replaced at once when it is complete.
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
    curves: Mapping[str, Iterable[tuple[float, float]]],
    chance: float,
    threshold: float = 0.5,
) -> None:
    """What ``depth_curves`` shows, without its legend, on an axis of a larger figure."""
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
    """Write one panel for each order of removal, in it a curve for each method.

    Args:
        panels: (title, curves of (pixels removed in %, probability) points by method).
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


def write_figure(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` to the PNG file ``path`` and, for print, beside it as PDF."""
    write_picture(figure, path)
    write_picture(figure, Path(path).with_suffix(".pdf"))


def write_picture(figure: Figure, path: str | Path) -> None:
    picture, form = io.BytesIO(), "pdf" if Path(path).suffix == ".pdf" else "png"
    # left out: the same numbers give the same file
    stamps = {"pdf": {"CreationDate": None}, "png": {"Software": None}}
    figure.savefig(picture, format=form, dpi=150, metadata=stamps[form])
    try:
        write_atomically(Path(path), picture.getvalue())
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror}") from error
