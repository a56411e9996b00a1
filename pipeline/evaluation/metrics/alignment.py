"""Alignment of the dynamic weights of DAU layers with their inputs (arXiv 2109.13004)."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pipeline.distributed import gather_across_ranks
from pipeline.evaluation.metric import Metric, Result, Row
from pipeline.evaluation.subject import Subject
from pipeline.interpret.alignment import alignment_histograms, distribution
from pipeline.recipe.schema import EvaluationRecipe


def compute(subject: Subject, method: str) -> Result:
    """Distribution of cos(w, x) over units, positions and the first images, for each DAU layer.

    A model without DAU layers has no values and no rows.
    """
    mine: dict[str, Tensor] = {}
    samples = subject.share(subject.recipe.evaluation.alignment_images)
    for images, _ in subject.select(samples, subject.loader.batch_size, "alignment"):
        for name, histogram in alignment_histograms(subject.model, images).items():
            mine[name] = mine.get(name, 0) + histogram.cpu()
    # A process without images knows no layers.
    total: dict[str, Tensor] = {}
    for histograms in gather_across_ranks(mine):
        for name, histogram in histograms.items():
            total[name] = total.get(name, 0) + histogram
    rows: list[Row] = [
        {"layer": name, **distribution(histogram)} for name, histogram in total.items()
    ]
    if not rows:
        return Result({}, [])
    medians = [float(row["median"]) for row in rows]
    return Result({"interp/alignment": sum(medians) / len(medians)}, rows)


def draw(rows: Sequence[Row], evaluation: EvaluationRecipe, path: Path) -> None:
    """Draw one bar from quartile to quartile of cos(w, x) for each DAU layer, the output on top."""
    from pipeline.evaluation.plots import quartile_bars

    upwards = rows[::-1]
    names = [str(row["layer"]) for row in upwards]
    label = "cos(w, x): alignment of weight and input"
    quartile_bars(upwards, names, (-1.02, 1.02), label, 0.0, path)


METRIC = Metric(
    compute,
    names={"interp/alignment": "cos(w, x) of the DAU layers: mean of their medians"},
    settings=("alignment_images",),
    by_layer={
        "interp/alignment_by_layer": (
            "median of cos(w, x) of each DAU layer, at the end of the run",
            "median",
        )
    },
    figure=draw,
)
