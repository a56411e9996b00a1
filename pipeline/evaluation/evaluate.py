"""Metrics of a model on the validation split, each defined in docs/method.md: every image exactly
once for any number of processes.

One entry of METRICS is one metric; what it computes goes into values for tracking, and rows for a
table and a figure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.data.epoch_loader import EpochLoader
from pipeline.distributed import World, gather_across_ranks, sum_across_ranks
from pipeline.evaluation.cache import Result, ResultStore, Row
from pipeline.evaluation.subject import Subject
from pipeline.interpret.alignment import alignment_histograms, distribution
from pipeline.interpret.contributions import Layer, completeness_error, exact_layers, parts
from pipeline.interpret.depth import interpretable_area, interpretable_depth
from pipeline.interpret.methods import BY_LAYER, at_input_size, attribution_maps, own_place, places
from pipeline.interpret.pixel_removal import removal_curve
from pipeline.interpret.pointing_game import localisation_scores, make_grids, summary
from pipeline.recipe.schema import Recipe

# the method of the network itself
OWN = "contributions"
# grids explained together
GRIDS_AT_ONCE = 4
REMOVED_SHARE, REMOVAL_POINTS = 0.25, 129


@dataclass(frozen=True)
class LayerScore:
    """One point of the depth curve."""

    layer: str
    """Module name, "input" for the encoding."""
    distance: float
    localisation: float
    """Mean over all classes of all grids."""


@dataclass
class Evaluation:
    """Values by metric name, and the rows of every metric's table."""

    values: dict[str, float] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)

    def add(self, metric: str, result: Result) -> None:
        """Take in one result; a later value of one name replaces an earlier one."""
        self.values |= result.values
        if result.rows:
            self.tables.setdefault(metric, []).extend(result.rows)

    @property
    def curve(self) -> list[LayerScore]:
        """Localisation of the own contributions of every layer from the output back to the input;
        empty if not asked for.
        """
        rows = [row for row in self.tables.get("depth", []) if row["method"] == OWN]
        return [
            LayerScore(str(row["layer"]), float(row["distance"]), float(row["mean"]))
            for row in rows
        ]


def evaluate(
    model: nn.Module,
    recipe: Recipe,
    loader: EpochLoader,
    world: World,
    metrics: Sequence[str],
    methods: Sequence[str] = (OWN,),
    store: ResultStore | None = None,
) -> Evaluation:
    """Compute ``metrics`` (names of METRICS) of ``methods`` on all processes together; every
    process gets the same result.

    With a ``store``, what it holds is not computed again, and what is computed is stored at once:
    an interrupted evaluation continues with what is missing. The model is left in the mode in which
    it was found.
    """
    training = model.training
    model.eval()
    try:
        subject, result = Subject(model, recipe, loader, world), Evaluation()
        for name, method in tasks(metrics, methods):
            metric = METRICS[name]
            settings = {
                "seed": recipe.seed,
                **{key: getattr(recipe.evaluation, key) for key in metric.settings},
            }
            found = gather_across_ranks(
                store.get(name, method, settings) if store and world.is_main else None
            )[0]
            if found is None:
                found = metric.compute(subject, method)
                if store and world.is_main:
                    store.put(name, method, settings, found)
            result.add(name, found)
        return result
    finally:
        model.train(training)


def tasks(metrics: Sequence[str], methods: Sequence[str]) -> list[tuple[str, str]]:
    """(metric, method) pairs to compute: a metric that judges no maps once, the depth curve for
    methods that have one.
    """
    pairs = []
    for name in metrics:
        judged = methods if METRICS[name].by_method else (OWN,)
        pairs += [(name, method) for method in judged if name != "depth" or method in BY_LAYER]
    return list(dict.fromkeys(pairs))


def _accuracy(subject: Subject, method: str) -> Result:
    """Top-1, top-5 and the training loss of CoDA networks (binary cross entropy, summed over
    classes), over all images.
    """
    loss, top1, top5 = (subject.predicted.sums / subject.loader.samples).tolist()
    return Result({"val/loss": loss, "val/top1": top1, "val/top5": top5}, [])


def _completeness(subject: Subject, method: str) -> Result:
    """Mean completeness error over the first images, predicted class, at the layer of the CoDA part
    where it is largest.
    """
    world, count = (
        subject.world,
        min(subject.recipe.evaluation.completeness_images, subject.loader.samples),
    )
    layers, predictions = exact_layers(subject.model, subject.layers), subject.predicted.predictions
    sums = torch.zeros(len(layers), dtype=torch.float64, device=world.device)
    for images, chosen in subject.select(
        subject.share(count), subject.loader.batch_size, "completeness"
    ):
        for index, layer in enumerate(layers):
            sums[index] += completeness_error(
                subject.model, images, predictions[chosen].to(world.device), layer.name
            ).sum()
    errors = sum_across_ranks(sums) / count
    rows: list[Row] = [
        {"layer": _title(layer), "error": error}
        for layer, error in zip(layers, errors.tolist(), strict=True)
    ]
    return Result({"interp/completeness_error": errors.max().item()}, rows)


def _alignment(subject: Subject, method: str) -> Result:
    """Distribution of cos(w, x) over units, positions and the first images, for each DAU layer;
    nothing without DAU layers.
    """
    total: dict[str, Tensor] = {}
    samples = subject.share(subject.recipe.evaluation.alignment_images)
    for images, _ in subject.select(samples, subject.loader.batch_size, "alignment"):
        for name, histogram in alignment_histograms(subject.model, images).items():
            total[name] = total.get(name, 0) + histogram.cpu()
    everyone = gather_across_ranks(total)
    names = dict.fromkeys(name for histograms in everyone for name in histograms)
    summed = {
        name: sum(histograms[name] for histograms in everyone if name in histograms)
        for name in names
    }
    rows: list[Row] = [
        {"layer": name, **distribution(histogram)} for name, histogram in summed.items()
    ]
    if not rows:
        return Result({}, [])
    return Result({"interp/alignment": sum(float(row["median"]) for row in rows) / len(rows)}, rows)


def _localisation(subject: Subject, method: str) -> Result:
    """Grid pointing game of the maps of ``method``; of own contributions at the junction too, see
    ``exact_layers``.
    """
    layers = [own_place(method, subject.layers)]
    if method == OWN:
        layers = [exact_layers(subject.model, subject.layers)[-1], *layers]
    scores, grids = _play(subject, method, layers, subject.recipe.evaluation.grid_size)
    return Result(
        {"interp/grids": grids, **_named("localisation", method, scores)},
        _score_rows(method, layers, scores, grids),
    )


def _localisation_2x2(subject: Subject, method: str) -> Result:
    """The same with grids of 2 x 2, wherever the method makes its map."""
    layers = [own_place(method, subject.layers)]
    scores, grids = _play(subject, method, layers, 2)
    return Result(
        _named("localisation_2x2", method, scores), _score_rows(method, layers, scores, grids)
    )


def _depth(subject: Subject, method: str) -> Result:
    """Grid pointing game at every layer; interpretable depth and area of the curve."""
    layers = places(method, subject.layers)
    scores, grids = _play(subject, method, layers, subject.recipe.evaluation.grid_size)
    rows, values = _score_rows(method, layers, scores, grids), {"interp/grids": float(grids)}
    if scores:
        points = [
            (layer.distance, score.double().mean().item())
            for layer, score in zip(layers, scores, strict=True)
        ]
        values |= {
            _name("depth", method): interpretable_depth(points),
            _name("area", method): interpretable_area(points),
        }
    if method == OWN:
        junction = len(exact_layers(subject.model, layers)) - 1
        values |= _named("localisation", method, [scores[junction], scores[-1]] if scores else [])
    return Result(values, rows)


def _pixel_removal(subject: Subject, method: str) -> Result:
    """Probability of the true class while up to a quarter of the pixels go, in the order of their
    importance, over the first images.

    Images of fewer than 23 x 24 pixels have fewer points than 129: one for each pixel removed.
    """
    side, world, place = (
        subject.recipe.data.evaluated_size,
        subject.world,
        own_place(method, subject.layers),
    )
    points = min(REMOVAL_POINTS, int(REMOVED_SHARE * side * side) + 1)
    encode, forward_encoded, *_ = parts(subject.model)
    count, labels = (
        min(subject.recipe.evaluation.removal_images, subject.loader.samples),
        subject.predicted.labels,
    )
    orders: tuple[Literal["least", "most"], ...] = ("least", "most")
    sums = {
        first: torch.zeros(points, dtype=torch.float64, device=world.device) for first in orders
    }
    for images, chosen in subject.select(
        subject.share(count), subject.loader.batch_size, f"pixel removal, {method}"
    ):
        targets = labels[chosen].to(world.device)
        maps = attribution_maps(method, subject.model, images, targets[:, None], [place.name])[
            place.name
        ]
        importance = at_input_size(maps, side, side)[:, 0]
        for first, total in sums.items():
            curve = removal_curve(
                forward_encoded,
                encode(images),
                importance,
                targets,
                fraction=REMOVED_SHARE,
                points=points,
                first=first,
            )
            total += curve.double().sum(0)
    step = int(REMOVED_SHARE * side * side) // (points - 1)
    rows: list[Row] = []
    values = {}
    for first, total in sums.items():
        curve = sum_across_ranks(total).cpu() / count
        values[_name(f"pixel_removal_{first}", method)] = curve.mean().item()
        rows += [
            {"method": method, "first": first, "removed": k * step / side**2, "probability": p}
            for k, p in enumerate(curve.tolist())
        ]
    least, most = (values[_name(f"pixel_removal_{first}", method)] for first in orders)
    values[_name("pixel_removal", method)] = least - most
    return Result(values, rows)


@dataclass(frozen=True)
class Metric:
    """How a metric is computed, whether it judges the maps of methods, and the keys of
    recipe.evaluation that decide its numbers.
    """

    compute: Callable[[Subject, str], Result]
    by_method: bool = False
    settings: tuple[str, ...] = ()


METRICS = {
    "accuracy": Metric(_accuracy),
    "completeness": Metric(_completeness, settings=("completeness_images",)),
    "alignment": Metric(_alignment, settings=("alignment_images",)),
    "localisation": Metric(_localisation, True, ("grid_size", "grids")),
    "localisation_2x2": Metric(_localisation_2x2, True, ("grids",)),
    "pixel_removal": Metric(_pixel_removal, True, ("removal_images",)),
    "depth": Metric(_depth, True, ("grid_size", "grids")),
}


def _play(
    subject: Subject, method: str, layers: Sequence[Layer], n: int
) -> tuple[list[Tensor], int]:
    """Localisation scores (G * n²,) of every layer over the same n x n grids, and G; no scores if
    the images do not fill one grid.
    """
    world, predicted, chosen = subject.world, subject.predicted, subject.grids(n)
    mine: list[list[Tensor]] = [[] for _ in layers]
    samples = chosen[world.rank :: world.size].flatten()
    for images, numbers in subject.select(
        samples, GRIDS_AT_ONCE * n * n, f"localisation {n}x{n}, {method}"
    ):
        grid_images = make_grids(images.unflatten(0, (-1, n * n)))
        targets = predicted.labels[numbers].view(-1, n * n).to(world.device)
        maps = attribution_maps(
            method, subject.model, grid_images, targets, [layer.name for layer in layers]
        )
        for scores, layer in zip(mine, layers, strict=True):
            scores.append(localisation_scores(maps[layer.name], n).flatten().cpu())
    pooled = subject.pool(mine)
    return (pooled if len(chosen) else []), len(chosen)


def _score_rows(
    method: str, layers: Sequence[Layer], scores: Sequence[Tensor], grids: int
) -> list[Row]:
    """One row per layer, where the junction can be the input; none without scores."""
    rows: dict[str, Row] = {
        _title(layer): {
            "method": method,
            "layer": _title(layer),
            "distance": layer.distance,
            "grids": grids,
            **summary(pooled),
        }
        for layer, pooled in zip(layers, scores, strict=bool(scores))
    }
    return list(rows.values())


def _named(base: str, method: str, scores: Sequence[Tensor]) -> dict[str, float]:
    """Metric values of scores [at the input], or [at the junction, at the input]; none without
    scores.
    """
    values = {}
    for suffix, pooled in zip(("", "_junction"), reversed(scores), strict=False):
        for stat, value in summary(pooled).items():
            values[_name(base + suffix, method) + ("" if stat == "mean" else f"_{stat}")] = value
    return values


def _name(base: str, method: str) -> str:
    return f"interp/{base}" if method == OWN else f"interp/{method}/{base}"


def _title(layer: Layer) -> str:
    return layer.name or "input"
