"""Interpretable depth: how far from the output explanations still localise (docs/method.md)."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.evaluation.grid_game import play, score_rows, score_values
from pipeline.evaluation.metric import OWN, Column, Metric, Result, Row, value_name
from pipeline.evaluation.metrics.localisation import AT_JUNCTION, NAME
from pipeline.evaluation.subject import Subject
from pipeline.interpret.contributions import exact_layers
from pipeline.interpret.depth import interpretable_area, interpretable_depth
from pipeline.interpret.methods import BY_LAYER, places
from pipeline.recipe.schema import EvaluationRecipe


def compute(subject: Subject, method: str) -> Result:
    """Play the grid pointing game at every layer; depth and area of the curve.

    Of own contributions it includes the values of the metric ``localisation``.
    """
    layers = places(method, subject.layers)
    scores, grids = play(subject, method, layers, subject.recipe.evaluation.grid_size)
    values = {"interp/grids": float(grids)}
    if scores:
        points = [
            (layer.distance, pooled.double().mean().item())
            for layer, pooled in zip(layers, scores, strict=True)
        ]
        values[value_name("interp/depth", method)] = interpretable_depth(points)
        values[value_name("interp/area", method)] = interpretable_area(points)
        if method == OWN:
            junction = len(exact_layers(subject.model, layers)) - 1
            values |= score_values(NAME, method, scores[-1])
            values |= score_values(AT_JUNCTION, method, scores[junction])
    return Result(values, score_rows(method, layers, scores, grids))


def draw(rows: Sequence[Row], evaluation: EvaluationRecipe, path: Path) -> None:
    """Draw the mean localisation against the distance from the output, a curve for each method."""
    from pipeline.evaluation.plots import depth_curves

    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        point = (float(row["distance"]), float(row["mean"]))
        curves.setdefault(str(row["method"]), []).append(point)
    depth_curves(curves, 1 / evaluation.grid_size**2, path)


METRIC = Metric(
    compute,
    names={
        "interp/depth": "interpretable depth: the largest distance from the output that still "
        "localises",
        "interp/area": "area under the curve of localisation against distance from the output",
    },
    settings=("grid_size", "grids"),
    methods=BY_LAYER,
    by_layer={
        "interp/localisation_by_layer": (
            "mean localisation of each layer, at the end of the run",
            "mean",
        )
    },
    columns={
        "interp/depth": Column("interpretable depth"),
        "interp/area": Column("interpretable area"),
    },
    figure=draw,
    picture="depth_curve",
)
