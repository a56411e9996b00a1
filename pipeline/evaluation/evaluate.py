"""Metrics of a model on the validation split, computed once and by all processes together.

Every image counts exactly once for any number of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from pipeline.data.epoch_loader import EpochLoader
from pipeline.distributed import World, gather_across_ranks
from pipeline.evaluation.cache import ResultCache
from pipeline.evaluation.metric import OWN, Result, Row
from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.subject import Subject
from pipeline.recipe.schema import Recipe


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

    def own_rows(self, metric: str) -> list[Row]:
        """Rows of a metric's table that are of the network's own contributions, or of no method."""
        return [row for row in self.tables.get(metric, []) if row.get("method", OWN) == OWN]


def evaluate(
    model: nn.Module,
    recipe: Recipe,
    loader: EpochLoader,
    world: World,
    metrics: Sequence[str],
    methods: Sequence[str] = (OWN,),
    cache: ResultCache | None = None,
) -> Evaluation:
    """Compute ``metrics`` of ``methods`` on all processes; every process gets the same result.

    What the ``cache`` holds is not computed again, and what is computed is put there at once: an
    interrupted evaluation continues with what is missing. The model is left in the mode in which
    it was found.

    Args:
        model: on the device of ``world``.
        recipe: settings of the metrics, and the seed.
        loader: of the split; it must visit every image once over all processes.
        world: this process among all.
        metrics: names of METRICS.
        methods: whose maps are judged.
        cache: results of the same weights and images; None computes everything.
    """
    training = model.training
    model.eval()
    try:
        subject, evaluation = Subject(model, recipe, loader, world), Evaluation()
        for name, method in tasks(metrics, methods):
            settings = {key: getattr(recipe.evaluation, key) for key in METRICS[name].settings}
            settings["seed"] = recipe.seed
            stored = cache.get(name, method, settings) if cache and world.is_main else None
            result = gather_across_ranks(stored)[0]
            if result is None:
                result = METRICS[name].compute(subject, method)
                if cache and world.is_main:
                    cache.put(name, method, settings, result)
            evaluation.add(name, result)
        return evaluation
    finally:
        model.train(training)


def tasks(metrics: Sequence[str], methods: Sequence[str]) -> list[tuple[str, str]]:
    """(metric, method) pairs to compute.

    A metric that judges no maps is computed once, any other for the methods that it can judge.
    """
    pairs = []
    for name in metrics:
        judged = METRICS[name].methods
        pairs += (
            [(name, method) for method in methods if method in judged] if judged else [(name, OWN)]
        )
    return list(dict.fromkeys(pairs))
