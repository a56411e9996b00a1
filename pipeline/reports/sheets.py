"""Sheets of contribution maps beside their images, as PNG files.

The colour rendering of contributions at the input encoding follows the figures of Böhle, Fritz,
Schiele, arXiv 2109.13004.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from pipeline.evaluation.plots import write_picture
from pipeline.interpret.contributions import Layer, exact_layers, layer_contributions

PERCENTILE = 99.5
"""Contributions beyond it have full strength, so that a few strong pixels do not hide the rest."""

SIGNED_COLOURS = "RdBu_r"
"""Blue against and red for the class, which colour-blind readers can tell apart."""

BACKGROUND = 0.5
"""Grey level on which both white and black contributions show."""


def write_contributions(
    model: nn.Module,
    layers: Sequence[Layer],
    images: Tensor,
    targets: Tensor,
    row_titles: Sequence[str],
    path: Path,
    *,
    overlays: bool = False,
) -> str | None:
    """Explain images, and write a sheet of the contributions at the input and at the junction.

    Args:
        model: the model to explain.
        layers: its ``explainable_layers``.
        images: (B, 3, H, W), RGB in [0, 1].
        targets: (B,) int64, the class explained in each image.
        row_titles: one for each image.
        path: PNG file.
        overlays: whether to show the maps over the images, too.

    Returns:
        name of the junction; None if it is the input.
    """
    junction = exact_layers(model, layers)[-1].name
    found = layer_contributions(model, images, targets[:, None], [None, junction])
    images = images.cpu()
    encoded = found[None][:, 0].cpu()  # (B, 3 or 6, H, W)
    columns = {"colours of the input": encoded} if encoded.shape[1] == 6 else {}
    places = {"at the input": encoded.sum(1)}
    if junction is not None:
        places[f"at {junction}"] = found[junction][:, 0].sum(1).cpu()
    for title, maps in places.items():
        columns[title] = maps
        if overlays:
            over = title.removeprefix("at the input").removeprefix("at ")
            columns[f"{over} over the image".strip()] = torch.stack(
                [overlay(image, found) for image, found in zip(images, maps, strict=True)]
            )
    contribution_sheet(images, list(columns.values()), list(columns), path, row_titles=row_titles)
    return junction


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
        maps: one entry per column. (R, h, w) are signed contributions, drawn from blue (against)
            over white to red (for), each map scaled to its own strongest contributions.
            (R, 6, H, W) are contributions at the input encoding, drawn by ``colour_rendering``.
            (R, 3, H, W) are pictures, such as ``overlay`` makes. Resolutions may differ.
        titles: one per column of maps.
        path: PNG file, replaced in one step when the sheet is complete.
        row_titles: one per image, for instance the class explained.

    Raises:
        UserError: the file cannot be written.
    """
    _check_lengths(images, maps, titles, row_titles)
    rows, columns = len(images), 1 + len(maps)
    figure = Figure(figsize=(2.0 * columns + 0.6, 2.0 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    signed = None
    for row in range(rows):
        _show_picture(axes[row, 0], images[row])
        for axis, column in zip(axes[row, 1:], maps, strict=True):
            if column.ndim == 4:
                pixels = column[row] if column.shape[1] == 3 else colour_rendering(column[row])
                _show_picture(axis, pixels)
            else:
                signed = _show_signed(axis, column[row])
        if row_titles:
            axes[row, 0].set_ylabel(row_titles[row])
    for axis, title in zip(axes[0], ["image", *titles], strict=True):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    if signed is not None:
        _add_colour_bar(figure, signed, axes)
    write_picture(figure, path)


def colour_rendering(contributions: Tensor) -> Tensor:
    """Render contributions (6, H, W) at the input encoding as RGB (3, H, W) in [0, 1] on grey.

    A pixel shows the colour it contributes with: r / (r + (1-r)), and so on, of the positive
    contributions of the encoded channels. Its opacity grows with its summed contribution; where
    the sum is negative, the pixel is transparent.
    """
    positive = contributions.clamp(min=0)
    pair = positive[:3] + positive[3:]
    colour = positive[:3] / torch.where(pair == 0, 1, pair)
    strength = contributions.sum(0).clamp(min=0)
    alpha = (strength / _scale(strength)).clamp(max=1)
    return alpha * colour + (1 - alpha) * BACKGROUND


def overlay(image: Tensor, contributions: Tensor) -> Tensor:
    """Draw a signed map (h, w) over its image (3, H, W), as RGB (3, H, W) in [0, 1].

    The image fades to grey; red is for and blue against the class. The opacity of a position grows
    with the strength of its contribution. A smaller map is up-sampled by nearest neighbour.
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


def _check_lengths(
    images: Tensor, maps: Sequence[Tensor], titles: Sequence[str], row_titles: Sequence[str]
) -> None:
    rows = len(images)
    fits = (
        len(titles) == len(maps)
        and all(len(column) == rows for column in maps)
        and len(row_titles) in (0, rows)
    )
    if not fits:
        raise ValueError(
            f"a sheet of {rows} images and {len(maps)} columns of maps needs as many rows in "
            "each, and as many titles"
        )


def _show_picture(axis: Axes, pixels: Tensor) -> None:
    """Draw an RGB picture (3, H, W) in [0, 1]."""
    channels_last = _array(pixels.clamp(0, 1)).transpose(1, 2, 0)  # (H, W, 3)
    axis.imshow(channels_last, interpolation="nearest")


def _show_signed(axis: Axes, contributions: Tensor) -> ScalarMappable:
    """Draw one signed map (h, w), scaled to [-1, 1]."""
    scaled = (contributions / _scale(contributions)).clamp(-1, 1)
    return axis.imshow(
        _array(scaled), cmap=SIGNED_COLOURS, norm=CenteredNorm(0, 1), interpolation="nearest"
    )


def _add_colour_bar(figure: Figure, signed: ScalarMappable, axes: np.ndarray) -> None:
    """Explain the colours of signed maps under all ``axes``."""
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
    scale = f"full colour: percentile {PERCENTILE} of its size"
    bar.set_label(f"contribution, each map on its own scale ({scale})", fontsize=8)


def _scale(values: Tensor) -> float:
    """High percentile of the absolute values, or their maximum if that is 0, or 1 if all are 0."""
    size = np.abs(_array(values))
    return float(np.percentile(size, PERCENTILE)) or float(size.max()) or 1.0


def _array(values: Tensor) -> np.ndarray:
    return values.detach().float().cpu().numpy()
