"""Pixel removal: the probability of the true class while pixels go in order of their importance.

Source: Böhle, Fritz, Schiele, arXiv 2109.13004, "pixel removal metric". The pixels that a good
explanation finds least important can all go without a loss of confidence; without those it finds
most important, the confidence is lost at once.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


@torch.no_grad()
def removal_curve(
    predict: Callable[[Tensor], Tensor],
    encoded_images: Tensor,
    maps: Tensor,
    targets: Tensor,
    *,
    fraction: float = 0.25,
    points: int = 129,
    first: Literal["least", "most"] = "least",
) -> Tensor:
    """Compute the probability of the target class with 0, step, 2·step, ... pixels removed.

    step is floor(fraction·H·W) // (points - 1). A removed pixel is 0 in all encoded channels, which
    no colour is (black is [0, 0, 0, 1, 1, 1]). Pixels are ordered by signed importance; of equally
    important ones the first in row-major order goes first, in either direction.

    Args:
        predict: encoded images (B, C, H, W) -> logits (B, classes).
        encoded_images: (B, C, H, W), with C = 6 for CoDA networks.
        maps: (B, H, W) importance of each pixel, contributions already summed over channels.
        targets: (B,) int64.
        fraction: share of the pixels that is removed in the end, in (0, 1].
        points: of the curve, 2 or more.
        first: remove the least (most negative) or the most important pixels first.

    Returns:
        (B, points) values of sigmoid(logit of the target).

    Raises:
        ValueError: shapes do not fit, or the images are too small for that many points.
    """
    batch, _, height, width = encoded_images.shape
    if maps.shape != (batch, height, width):
        raise ValueError(
            f"maps must be {(batch, height, width)}, summed over channels, got {tuple(maps.shape)}"
        )
    if first not in ("least", "most"):
        raise ValueError(f"first must be 'least' or 'most', got {first!r}")
    if points < 2 or not 0 < fraction <= 1:
        raise ValueError(
            f"a curve needs 2 points or more and a fraction in (0, 1], "
            f"got points={points} and fraction={fraction}"
        )
    step = int(fraction * height * width) // (points - 1)
    if step == 0:
        raise ValueError(
            f"{fraction:.0%} of {height}x{width} pixels are fewer than "
            f"the {points - 1} steps of the curve"
        )
    order = maps.flatten(1).argsort(dim=1, descending=first == "most", stable=True)
    # Place of each pixel in the order of removal.
    rank = order.argsort(dim=1).view(batch, 1, height, width)
    curve = []
    for removed in range(0, points * step, step):
        logits = predict(encoded_images.masked_fill(rank < removed, 0))
        curve.append(logits.gather(1, targets[:, None]).sigmoid())
    return torch.cat(curve, dim=1)
