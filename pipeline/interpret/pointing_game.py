"""Grid pointing game: does the explanation of a class point to the tile that shows it?

Source: Böhle, Fritz, Schiele, arXiv 2109.13004, "localisation metric". It differs from the official
evaluation in two things: sampling goes on while enough classes have images left, and grids are
row-major. Chance is 1 / n².
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def localisation_scores(maps: Tensor, n: int) -> Tensor:
    """Compute the share of each map's positive mass inside the cell of the class it explains.

    Maps are scored at their own resolution. Where n does not divide a side, every position is first
    repeated n times along it (nearest up-sampling), which splits a position between the cells it
    overlaps in proportion to the area.

    Args:
        maps: (G, n², n·h, n·w), already summed over channels; map k of a grid explains the class in
            cell k (row-major).
        n: grids have n x n cells.

    Returns:
        (G, n²) shares in [0, 1]; 0 for a map without positive mass, NaN for a map with a NaN.
    """
    if maps.ndim != 4 or maps.shape[1] != n * n:
        raise ValueError(
            f"maps of {n}x{n} grids must be (G, {n * n}, H, W), got {tuple(maps.shape)}"
        )
    positive = maps.clamp(min=0)
    for side in (2, 3):
        if positive.shape[side] % n:
            positive = positive.repeat_interleave(n, dim=side)
    cells = torch.unflatten(positive, 3, (n, -1))
    cells = torch.unflatten(cells, 2, (n, -1))  # (G, n², n, h, n, w)
    mass = cells.sum(dim=(3, 5)).flatten(2)  # (G, map, cell)
    total = mass.sum(dim=2)
    return mass.diagonal(dim1=1, dim2=2) / torch.where(total == 0, 1, total)


def choose_grids(
    label_logits: Tensor,
    labels: Tensor,
    predictions: Tensor,
    n: int,
    grids: int,
    generator: torch.Generator,
) -> Tensor:
    """Choose which samples make up the grids.

    A sample is eligible if it is classified correctly with sigmoid(logit) > 0.5. Each grid draws n²
    different classes among those with eligible samples left, and takes each one's next sample by
    descending logit (equal logits: lower index first). No sample is used twice; drawing stops when
    fewer than n² classes are left, and a shortage is logged.

    Args:
        label_logits: (N,) logit of each sample's own label.
        labels: (N,) int64.
        predictions: (N,) int64, the class with the highest logit.
        n: grids have n x n cells.
        grids: how many are wanted.
        generator: on the CPU; the choice depends on its state and on the other arguments alone.

    Returns:
        (G, n²) int64 indices into the samples, G <= ``grids``, on the CPU.
    """
    label_logits, labels, predictions = label_logits.cpu(), labels.cpu(), predictions.cpu()
    order = label_logits.argsort(descending=True, stable=True)
    order = order[(predictions[order] == labels[order]) & (label_logits[order] > 0)]
    # Samples that are left, by class in ascending order.
    left = {
        label: order[labels[order] == label].tolist()
        for label in sorted(set(labels[order].tolist()))
    }
    confident = len(left)
    chosen: list[list[int]] = []
    while len(chosen) < grids and len(left) >= n * n:
        classes = list(left)
        drawn = [
            classes[i] for i in torch.randperm(len(classes), generator=generator)[: n * n].tolist()
        ]
        chosen.append([left[label].pop(0) for label in drawn])
        left = {label: samples for label, samples in left.items() if samples}
    if len(chosen) < grids:
        log.warning(
            "pointing game: %d of %d grids of %dx%d images: %d classes have images that are "
            "classified correctly with p > 0.5, %d such images in all; "
            "a grid takes one image of each of %d classes",
            len(chosen),
            grids,
            n,
            n,
            confident,
            len(order),
            n * n,
        )
    return torch.tensor(chosen, dtype=torch.int64).reshape(-1, n * n)


def make_grids(images: Tensor) -> Tensor:
    """Tile images (G, n², C, h, w) row-major into grids (G, C, n·h, n·w) at full resolution."""
    n = round(images.shape[1] ** 0.5)
    if images.ndim != 5 or n * n != images.shape[1]:
        raise ValueError(f"images of grids must be (G, n², C, h, w), got {tuple(images.shape)}")
    cells = torch.unflatten(images, 1, (n, n))  # (G, n, n, C, h, w)
    rows = cells.permute(0, 3, 1, 4, 2, 5)  # (G, C, n, h, n, w)
    return rows.flatten(4, 5).flatten(2, 3)


def summary(scores: Tensor) -> Mapping[str, float]:
    """Compute ``mean``, ``q25``, ``median`` and ``q75`` of all scores pooled.

    Raises:
        ValueError: there are no scores.
    """
    if scores.numel() == 0:
        raise ValueError("no scores to summarise: no grid was made")
    pooled = scores.flatten().double()
    quartiles = pooled.quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=pooled.device)
    )
    q25, median, q75 = quartiles.tolist()
    return {"mean": pooled.mean().item(), "q25": q25, "median": median, "q75": q75}
