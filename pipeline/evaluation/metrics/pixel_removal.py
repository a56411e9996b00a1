"""Pixel removal: confidence while pixels go in the order of importance (arXiv 2109.13004)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pipeline.distributed import sum_across_ranks
from pipeline.evaluation.metric import Metric, Result, Row, value_name
from pipeline.evaluation.subject import Subject
from pipeline.interpret.contributions import parts
from pipeline.interpret.methods import METHODS, at_input_size, attribution_maps, own_place
from pipeline.interpret.pixel_removal import removal_curve
from pipeline.recipe.schema import EvaluationRecipe

REMOVED_SHARE = 0.25
POINTS = 129
"""Points of a curve. Images of fewer than 23 x 24 pixels have one for each pixel removed."""

ORDERS: tuple[Literal["least", "most"], ...] = ("least", "most")
TITLES = {
    "least": "least important first (higher is better)",
    "most": "most important first (lower is better)",
}


def compute(subject: Subject, method: str) -> Result:
    """Mean probability of the true class while a quarter of the pixels go, in both orders."""
    loader = subject.loader
    pixels = subject.recipe.data.evaluated_size**2
    points = min(POINTS, int(REMOVED_SHARE * pixels) + 1)
    step = int(REMOVED_SHARE * pixels) // (points - 1)
    count = min(subject.recipe.evaluation.removal_images, loader.samples)
    curves = {
        first: curve / count for first, curve in _sums(subject, method, count, points).items()
    }
    rows: list[Row] = []
    values = {}
    for first, curve in curves.items():
        values[value_name(f"interp/pixel_removal_{first}", method)] = curve.mean().item()
        for k, probability in enumerate(curve.tolist()):
            row: Row = {"method": method, "first": first, "removed": k * step / pixels}
            rows.append({**row, "probability": probability})
    gap = curves["least"].mean() - curves["most"].mean()
    values[value_name("interp/pixel_removal", method)] = gap.item()
    return Result(values, rows)


def _sums(subject: Subject, method: str, count: int, points: int) -> dict[str, Tensor]:
    """Curves (points,) in float64, summed over the first ``count`` images of all processes."""
    side, world = subject.recipe.data.evaluated_size, subject.world
    encode, forward_encoded, *_ = parts(subject.model)
    place, labels = own_place(method, subject.layers).name, subject.predicted.labels
    zeros = torch.zeros(points, dtype=torch.float64, device=world.device)
    sums = {first: zeros.clone() for first in ORDERS}
    samples, task = subject.share(count), f"pixel removal, {method}"
    for images, chosen in subject.select(samples, subject.loader.batch_size, task):
        targets = labels[chosen].to(world.device)
        maps = attribution_maps(method, subject.model, images, targets[:, None], [place])[place]
        importance = at_input_size(maps, side, side)[:, 0]
        for first in ORDERS:
            curve = removal_curve(
                forward_encoded,
                encode(images),
                importance,
                targets,
                fraction=REMOVED_SHARE,
                points=points,
                first=first,
            )
            sums[first] += curve.double().sum(0)
    return {first: sum_across_ranks(total).cpu() for first, total in sums.items()}


def draw(rows: Sequence[Row], evaluation: EvaluationRecipe, path: Path) -> None:
    """Draw the mean probability against the share of pixels removed, a curve for each method."""
    from pipeline.evaluation.plots import removal_curves

    panels = []
    for first, title in TITLES.items():
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["first"] == first:
                point = (100 * float(row["removed"]), float(row["probability"]))
                curves.setdefault(str(row["method"]), []).append(point)
        panels.append((title, curves))
    removal_curves(panels, path)


METRIC = Metric(
    compute,
    names={
        "interp/pixel_removal": "pixel_removal_least - pixel_removal_most: 1 is best, 0 is a "
        "random order",
        "interp/pixel_removal_least": "probability of the true class while the least important "
        "quarter of the pixels goes",
        "interp/pixel_removal_most": "probability of the true class while the most important "
        "quarter of the pixels goes",
    },
    settings=("removal_images",),
    methods=METHODS,
    figure=draw,
)
