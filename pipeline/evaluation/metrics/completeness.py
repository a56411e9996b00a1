"""Completeness: whether contributions add up to the logit (arXiv 2109.13004, section 3)."""

import torch

from pipeline.distributed import sum_across_ranks
from pipeline.evaluation.metric import Column, Metric, Result, Row, layer_title
from pipeline.evaluation.subject import Subject
from pipeline.interpret.contributions import completeness_error, exact_layers


def compute(subject: Subject, method: str) -> Result:
    """Mean completeness error of the predicted class over the first images.

    The value is that of the layer of the CoDA part where it is largest; the rows have all.
    """
    world, loader = subject.world, subject.loader
    count = min(subject.recipe.evaluation.completeness_images, loader.samples)
    layers = exact_layers(subject.model, subject.layers)
    predictions = subject.predicted.predictions
    sums = torch.zeros(len(layers), dtype=torch.float64, device=world.device)
    for images, chosen in subject.select(subject.share(count), loader.batch_size, "completeness"):
        targets = predictions[chosen].to(world.device)
        for index, layer in enumerate(layers):
            sums[index] += completeness_error(subject.model, images, targets, layer.name).sum()
    errors = (sum_across_ranks(sums) / count).tolist()
    rows: list[Row] = [
        {"layer": layer_title(layer), "error": error}
        for layer, error in zip(layers, errors, strict=True)
    ]
    return Result({"interp/completeness_error": max(errors)}, rows)


METRIC = Metric(
    compute,
    names={
        "interp/completeness_error": "|sum of contributions - T (logit - b0)| / "
        "sum of |contributions|"
    },
    settings=("completeness_images",),
    columns={"interp/completeness_error": Column("completeness error", ".1e")},
)
