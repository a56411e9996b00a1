"""What a metric is: how it is computed, what its values mean, and how its rows are shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.evaluation.subject import Subject
from pipeline.interpret.contributions import Layer
from pipeline.recipe.schema import EvaluationRecipe

OWN = "contributions"
"""The method of the network itself, whose values have names without a method."""

Row = dict[str, str | float | int]


@dataclass(frozen=True)
class Result:
    """What one metric found of one method."""

    values: dict[str, float]
    """By metric name."""
    rows: list[Row]
    """Of its table and figure."""


@dataclass(frozen=True)
class Column:
    """A value in tables that compare runs."""

    title: str
    format: str = ".4f"


@dataclass(frozen=True)
class Metric:
    """All there is to say of a metric. Its name is that of its file in ``evaluation/metrics``."""

    compute: Callable[[Subject, str], Result]
    """(subject, method) -> result. Every process calls it; all get the same result."""
    names: Mapping[str, str]
    """Names of its values and what they mean; of other methods' maps see ``value_name``."""
    settings: tuple[str, ...] = ()
    """Keys of recipe.evaluation that decide its numbers."""
    methods: Sequence[str] = ()
    """Methods whose maps it judges; none if it judges no maps and is computed once."""
    of_own: Mapping[str, str] = field(default_factory=dict)
    """Names, beside ``names``, of values that only the network's own contributions have."""
    by_layer: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Name of a curve over the layers -> its meaning, and the column of the rows that it shows."""
    columns: Mapping[str, Column] = field(default_factory=dict)
    """Values that are shown where runs are compared, by name."""
    figure: Callable[[Sequence[Row], EvaluationRecipe, Path], None] | None = None
    """Draws the rows of all methods into a PNG file, and a PDF beside it."""
    picture: str = ""
    """Stem of that file; the metric's name if it is empty."""


def layer_title(layer: Layer) -> str:
    """How tables and figures name a layer."""
    return layer.name or "input"


def value_name(name: str, method: str) -> str:
    """Name of a value of ``method``: ``interp/x`` is that of the network's own contributions.

    >>> value_name("interp/depth", "contributions"), value_name("interp/depth", "lime")
    ('interp/depth', 'interp/lime/depth')
    """
    return name if method == OWN else name.replace("interp/", f"interp/{method}/", 1)
