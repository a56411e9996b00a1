"""Metrics of a model on the validation split: every image exactly once for any number of processes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.data.load import EpochLoader, unit_range
from pipeline.distributed import World, gather_across_ranks, sum_across_ranks
from pipeline.interpret.depth import interpretable_area, interpretable_depth
from pipeline.interpret.explain import Layer, completeness_error, exact_layers, explainable_layers, layer_contributions
from pipeline.interpret.pointing_game import choose_grids, localisation_scores, make_grids, summary
from pipeline.recipe import Recipe

GRIDS_AT_ONCE = 4  # grids explained together


@dataclass(frozen=True)
class LayerScore:
    """One point of the depth curve."""

    layer: str  # module name, "input" for the encoding
    distance: float
    localisation: float  # mean over all classes of all grids


@dataclass
class Evaluation:
    """Values by metric name, and the localisation of every layer from the output back to the input where it was asked for."""

    values: dict[str, float] = field(default_factory=dict)
    curve: list[LayerScore] = field(default_factory=list)


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and what the metrics share: each sample's label, prediction and logit of its own label."""

    model: nn.Module
    recipe: Recipe
    loader: EpochLoader
    world: World
    labels: Tensor  # (N,) of the whole split, like the next two
    predictions: Tensor
    label_logits: Tensor
    sums: Tensor  # (3,): loss, top-1 hits, top-5 hits, over all images of all processes


def evaluate(model: nn.Module, recipe: Recipe, loader: EpochLoader, world: World, metrics: tuple[str, ...]) -> Evaluation:
    """Compute ``metrics`` (names of ``METRICS``) on all processes together; every process gets the same result.

    The model is left in the mode in which it was found.
    """
    training = model.training
    model.eval()
    try:
        subject = _predict(model, recipe, loader, world)
        result = Evaluation()
        for name in metrics:
            METRICS[name](subject, result)
        return result
    finally:
        model.train(training)


@torch.no_grad()
def _predict(model: nn.Module, recipe: Recipe, loader: EpochLoader, world: World) -> Subject:
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    rows: list[Tensor] = []
    with loader.epoch(0) as batches:
        for batch in _progress(batches, loader.batches_per_epoch, "evaluate", world):
            labels = batch.labels.to(world.device)
            logits = model(unit_range(batch.images, world.device)).float()
            ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.shape[1]).float(), reduction="sum")
            sums += torch.stack([loss.double(), ranked[:, 0].sum(), ranked.any(1).sum()])
            own = logits.gather(1, labels[:, None])[:, 0]
            rows.append(torch.stack([batch.indices.double(), batch.labels.double(), logits.argmax(1).double().cpu(), own.double().cpu()]))
    mine = torch.cat(rows, dim=1) if rows else torch.zeros(4, 0, dtype=torch.float64)
    table = torch.cat(gather_across_ranks(mine), dim=1)  # (4, N)
    table = table[:, table[0].argsort()]
    if table.shape[1] != loader.samples:
        raise RuntimeError(f"{table.shape[1]} of {loader.samples} images were evaluated")
    labels, predictions = table[1].long(), table[2].long()
    return Subject(model, recipe, loader, world, labels, predictions, table[3].float(), sum_across_ranks(sums).cpu())


def _accuracy(subject: Subject, result: Evaluation) -> None:
    """Top-1, top-5 and the training loss of CoDA networks (binary cross entropy, summed over classes), over all images."""
    loss, top1, top5 = (subject.sums / subject.loader.samples).tolist()
    result.values |= {"val/loss": loss, "val/top1": top1, "val/top5": top5}


def _completeness(subject: Subject, result: Evaluation) -> None:
    """Mean completeness error over the first images, predicted class, at the layer of the CoDA part where it is largest."""
    world, count = subject.world, min(subject.recipe.evaluation.completeness_images, subject.loader.samples)
    layers = exact_layers(subject.model, explainable_layers(subject.model, _example(subject)))
    sums = torch.zeros(len(layers), dtype=torch.float64, device=world.device)
    samples = torch.arange(world.rank, count, world.size)
    for images, chosen in _select(subject, samples, subject.loader.batch_size, "completeness"):
        targets = subject.predictions[chosen].to(world.device)
        for index, layer in enumerate(layers):
            sums[index] += completeness_error(subject.model, images, targets, layer.name).sum()
    result.values["interp/completeness_error"] = (sum_across_ranks(sums) / count).max().item()


def _localisation(subject: Subject, result: Evaluation) -> None:
    """Grid pointing game at the input and at the junction, the deepest layer from which the network is exactly dynamic linear."""
    layers = explainable_layers(subject.model, _example(subject))
    _score(subject, result, [exact_layers(subject.model, layers)[-1], layers[-1]])


def _depth(subject: Subject, result: Evaluation) -> None:
    """Grid pointing game at every layer; interpretable depth and area of the curve."""
    layers = explainable_layers(subject.model, _example(subject))
    scores = _score(subject, result, layers)
    if scores is not None:
        means = [s.double().mean().item() for s in scores]
        result.curve = [LayerScore(layer.name or "input", layer.distance, mean) for layer, mean in zip(layers, means, strict=True)]
        points = [(layer.distance, mean) for layer, mean in zip(layers, means, strict=True)]
        result.values |= {"interp/depth": interpretable_depth(points), "interp/area": interpretable_area(points)}


METRICS: dict[str, Callable[[Subject, Evaluation], None]] = {
    "accuracy": _accuracy,
    "completeness": _completeness,
    "localisation": _localisation,
    "depth": _depth,
}


def _score(subject: Subject, result: Evaluation, layers: list[Layer]) -> list[Tensor] | None:
    """Localisation scores (G * n²,) of every layer over the same grids; None if the images do not fill one grid."""
    evaluation, world = subject.recipe.evaluation, subject.world
    generator = torch.Generator().manual_seed(subject.recipe.seed)
    n = evaluation.grid_size
    chosen = choose_grids(subject.label_logits, subject.labels, subject.predictions, n, evaluation.grids, generator)
    result.values["interp/grids"] = len(chosen)
    mine: list[list[Tensor]] = [[] for _ in layers]
    for images, samples in _select(subject, chosen[world.rank :: world.size].flatten(), GRIDS_AT_ONCE * n * n, "localisation"):
        grids = make_grids(images.unflatten(0, (-1, n * n)))
        targets = subject.labels[samples].view(-1, n * n).to(world.device)
        maps = layer_contributions(subject.model, grids, targets, [layer.name for layer in layers], sum_channels=True)
        for scores, layer in zip(mine, layers, strict=True):
            scores.append(localisation_scores(maps[layer.name], n).flatten().cpu())
    parts = gather_across_ranks([torch.cat(scores) if scores else torch.zeros(0) for scores in mine])
    if not len(chosen):
        return None
    scores = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    exact = len(exact_layers(subject.model, layers)) - 1
    for suffix, layer_scores in (("", scores[-1]), ("_junction", scores[exact])):
        stats = summary(layer_scores)
        result.values |= {f"interp/localisation{suffix}": stats["mean"], f"interp/localisation{suffix}_median": stats["median"]}
    return scores


def _select(subject: Subject, samples: Tensor, size: int, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(images in [0, 1] on the device, their numbers) of ``samples`` in that order, ``size`` at a time."""
    with subject.loader.select(samples.numpy()) as batches:
        images = (image for batch in batches for image in batch.images)
        for begin in _progress(range(0, len(samples), size), math.ceil(len(samples) / size), what, subject.world):
            numbers = samples[begin : begin + size]
            yield unit_range(torch.stack([next(images) for _ in numbers]), subject.world.device), numbers


def _example(subject: Subject) -> Tensor:
    size = subject.recipe.data.image_size
    return torch.zeros(1, 3, size, size, device=subject.world.device)


def _progress(iterable, total: int, what: str, world: World):
    return tqdm(iterable, total=total, desc=what, leave=False, disable=not world.is_main)
