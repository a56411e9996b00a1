"""Localisation: the grid pointing game with grids of the recipe's size (arXiv 2109.13004)."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.evaluation.grid_game import (
    draw_localisation,
    play,
    score_rows,
    score_values,
    with_quartiles,
)
from pipeline.evaluation.metric import OWN, Column, Metric, Result, Row
from pipeline.evaluation.subject import Subject
from pipeline.interpret.contributions import exact_layers
from pipeline.interpret.methods import METHODS, own_place
from pipeline.recipe.schema import EvaluationRecipe

NAME, AT_JUNCTION = "interp/localisation", "interp/localisation_junction"


def compute(subject: Subject, method: str) -> Result:
    """Localisation of the maps of ``method``; of own contributions at the junction, too."""
    layers = [own_place(method, subject.layers)]
    if method == OWN:
        layers.insert(0, exact_layers(subject.model, subject.layers)[-1])
    scores, grids = play(subject, method, layers, subject.recipe.evaluation.grid_size)
    values = {"interp/grids": float(grids)}
    if scores:
        values |= score_values(NAME, method, scores[-1])
        if method == OWN:
            values |= score_values(AT_JUNCTION, method, scores[0])
    return Result(values, score_rows(method, layers, scores, grids))


def draw(rows: Sequence[Row], evaluation: EvaluationRecipe, path: Path) -> None:
    """Draw the quartiles of every method."""
    draw_localisation(rows, 1 / evaluation.grid_size**2, path)


METRIC = Metric(
    compute,
    names=with_quartiles({NAME: "mean of the grid pointing game where the method makes its map"}),
    of_own={
        "interp/grids": "number of grids behind the localisation",
        **with_quartiles(
            {AT_JUNCTION: "mean of the grid pointing game where the CoDA part begins"}
        ),
    },
    settings=("grid_size", "grids"),
    methods=METHODS,
    columns={NAME: Column("localisation: input"), AT_JUNCTION: Column("at junction")},
    figure=draw,
)
