"""Pictures of explanations, as PNG files: contribution maps beside their images, and localisation
against distance.

The colour rendering of contributions at the input encoding follows the figures of Böhle, Fritz,
Schiele, arXiv 2109.13004.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import write_atomically

# contributions beyond it are shown at full strength, so that a few strong pixels do not hide the
# rest
PERCENTILE = 99.5
# blue against, red for the class; told apart by colour-blind readers
SIGNED_COLOURS = "RdBu_r"
# Okabe and Ito
CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X"
# grey on which both white and black contributions show
BACKGROUND = 0.5


def contribution_sheet(
    images: Tensor,
    maps: Sequence[Tensor],
    titles: Sequence[str],
    path: str | Path,
    *,
    row_titles: Sequence[str] = (),
) -> None:
    """Write a sheet with one row per image: the image, then one column per entry of ``maps``.

    Args:
        images: (R, 3, H, W), RGB in [0, 1].
        maps: of each column either (R, h, w), signed contributions, drawn from blue (against) over
            white to red (for) with each map scaled to its own strongest contributions; or (R, 6, H,
            W), contributions at the input encoding, drawn in colour by ``colour_rendering``; or (R,
            3, H, W), pictures such as ``overlay`` makes. Resolutions may differ between columns.
        titles: of the columns of maps.
        path: PNG file, replaced at once when it is complete.
        row_titles: one per image, for instance the class explained.

    Raises:
        UserError: the file cannot be written.
    """
    rows, columns = len(images), 1 + len(maps)
    if (
        len(titles) != len(maps)
        or any(len(column) != rows for column in maps)
        or len(row_titles) not in (0, rows)
    ):
        raise ValueError(
            f"a sheet of {rows} images and {len(maps)} columns of maps needs as many rows in each, and as many titles"
        )
    figure = Figure(figsize=(2.0 * columns + 0.6, 2.0 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    signed = None
    for row in range(rows):
        axes[row, 0].imshow(_channels_last(images[row]), interpolation="nearest")
        for column, stack in enumerate(maps, start=1):
            if stack.ndim == 4:
                picture = stack[row] if stack.shape[1] == 3 else colour_rendering(stack[row])
                axes[row, column].imshow(_channels_last(picture), interpolation="nearest")
            else:
                signed = _show_signed(axes[row, column], stack[row])
        if row_titles:
            axes[row, 0].set_ylabel(row_titles[row])
    for axis, title in zip(axes[0], ["image", *titles], strict=True):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    if signed is not None:
        bar = figure.colorbar(
            signed,
            ax=axes,
            orientation="horizontal",
            ticks=[-1, 0, 1],
            aspect=40,
            shrink=0.6,
            pad=0.02,
        )
        bar.ax.set_xticklabels(["against the class", "0", "for the class"])
        bar.set_label(
            f"contribution, each map on its own scale (full colour: percentile {PERCENTILE} of its size)",
            fontsize=8,
        )
    _write(figure, path)


def colour_rendering(contributions: Tensor) -> Tensor:
    """Contributions (6, H, W) at the input encoding as an RGB picture (3, H, W) in [0, 1] on grey.

    A pixel shows the colour it contributes with, r / (r + (1-r)) and so on of the positive
    contributions of the encoded channels; it is the more opaque the larger its summed contribution,
    and transparent where that is negative.
    """
    positive = contributions.clamp(min=0)
    pair = positive[:3] + positive[3:]
    colour = positive[:3] / torch.where(pair == 0, 1, pair)
    strength = contributions.sum(0).clamp(min=0)
    alpha = (strength / _scale(strength)).clamp(max=1)
    return alpha * colour + (1 - alpha) * BACKGROUND


def overlay(image: Tensor, contributions: Tensor) -> Tensor:
    """An image (3, H, W) faded to grey under its signed map (h, w), red for and blue against the
    class, as RGB (3, H, W) in [0, 1].

    A position is the more opaque the stronger its contribution; a smaller map is up-sampled by
    nearest.
    """
    scaled = (contributions / _scale(contributions)).clamp(-1, 1)[None, None].to(image)
    scaled = torch.nn.functional.interpolate(scaled, size=image.shape[1:], mode="nearest")[0]
    strong = {
        sign: torch.tensor(colormaps[SIGNED_COLOURS](shade)[:3]).to(image)[:, None, None]
        for sign, shade in ((1, 0.95), (-1, 0.05))
    }
    colour = torch.where(scaled > 0, strong[1], strong[-1])
    faded = 0.5 + 0.5 * image.mean(0, keepdim=True)
    return scaled.abs() * colour + (1 - scaled.abs()) * faded


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


def _show_signed(axis: Axes, contributions: Tensor) -> ScalarMappable:
    """Draws one signed map (h, w), scaled to [-1, 1]."""
    scaled = (contributions / _scale(contributions)).clamp(-1, 1)
    return axis.imshow(
        _array(scaled), cmap=SIGNED_COLOURS, norm=CenteredNorm(0, 1), interpolation="nearest"
    )


def _scale(values: Tensor) -> float:
    """A high percentile of the absolute values; their maximum where that is 0, and 1 where all are."""
    size = np.abs(_array(values))
    return float(np.percentile(size, PERCENTILE)) or float(size.max()) or 1.0


def _channels_last(image: Tensor) -> np.ndarray:
    return _array(image.clamp(0, 1)).transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)


def _array(values: Tensor) -> np.ndarray:
    return values.detach().float().cpu().numpy()


def write_figure(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` to the PNG file ``path`` and, for print, beside it as PDF."""
    _write(figure, path)
    _write(figure, Path(path).with_suffix(".pdf"))


def _write(figure: Figure, path: str | Path) -> None:
    picture, form = io.BytesIO(), "pdf" if Path(path).suffix == ".pdf" else "png"
    # left out: the same numbers give the same file
    stamps = {"pdf": {"CreationDate": None}, "png": {"Software": None}}
    figure.savefig(picture, format=form, dpi=150, metadata=stamps[form])
    try:
        write_atomically(Path(path), picture.getvalue())
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror}") from error
