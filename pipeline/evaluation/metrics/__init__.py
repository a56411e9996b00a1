"""The metrics, one file each. A metric is added by its file and its name in the recipe's list."""

from collections.abc import Mapping
from importlib import import_module
from typing import get_args

from pipeline.evaluation.metric import Metric, value_name
from pipeline.recipe.schema import MetricName

METRICS: Mapping[str, Metric] = {
    name: import_module(f"{__name__}.{name}").METRIC for name in get_args(MetricName)
}


def tracked_names() -> dict[str, tuple[str, str]]:
    """All names of values, with what each means and what its steps count in MLflow."""
    names = {}
    for metric in METRICS.values():
        for method in metric.methods or ("",):
            for name, meaning in metric.names.items():
                full = value_name(name, method) if method else name
                names[full] = (f"{method}: {meaning}" if method else meaning, "epoch")
        names |= {name: (meaning, "epoch") for name, meaning in metric.of_own.items()}
        for name, (meaning, _) in metric.by_layer.items():
            names[name] = (meaning, "layer index, from the output back to the input")
    return names
