"""Localisation with grids of 2 x 2, which images of ten classes fill more often."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.evaluation.grid_game import (
    draw_localisation,
    play,
    score_rows,
    score_values,
    with_quartiles,
)
from pipeline.evaluation.metric import Metric, Result, Row
from pipeline.evaluation.subject import Subject
from pipeline.interpret.methods import METHODS, own_place
from pipeline.recipe.schema import EvaluationRecipe

NAME = "interp/localisation_2x2"


def compute(subject: Subject, method: str) -> Result:
    """Localisation in 2 x 2 grids, wherever ``method`` makes its map."""
    layers = [own_place(method, subject.layers)]
    scores, grids = play(subject, method, layers, 2)
    values = score_values(NAME, method, scores[0]) if scores else {}
    return Result(values, score_rows(method, layers, scores, grids))


def draw(rows: Sequence[Row], evaluation: EvaluationRecipe, path: Path) -> None:
    """Draw the quartiles of every method."""
    draw_localisation(rows, 1 / 4, path)


METRIC = Metric(
    compute,
    names=with_quartiles({NAME: "mean of the game with grids of 2x2"}),
    settings=("grids",),
    methods=METHODS,
    figure=draw,
)
