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

# contributions beyond it are shown at full strength, so that a few strong pixels do not hide the
# rest
PERCENTILE = 99.5
# blue against, red for the class; told apart by colour-blind readers
SIGNED_COLOURS = "RdBu_r"
# grey on which both white and black contributions show
BACKGROUND = 0.5


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
    """Explain images and write the sheet: contributions at the input and at the junction.

    Args:
        model: what is explained.
        layers: its ``explainable_layers``.
        images: (B, 3, H, W), RGB in [0, 1].
        targets: (B,) int64, the class explained in each image.
        row_titles: one for each image.
        path: PNG file.
        overlays: whether to show the maps over the images, too.

    Returns:
        name of the junction; None where it is the input.
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
            pairs = zip(images, maps, strict=True)
            columns[f"{over} over the image".strip()] = torch.stack([overlay(*p) for p in pairs])
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
    write_picture(figure, path)


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
