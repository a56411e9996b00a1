"""The grid pointing game on a whole split, which several metrics play (arXiv 2109.13004)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pipeline.evaluation.metric import Row, layer_title, value_name
from pipeline.evaluation.subject import Subject
from pipeline.interpret.contributions import Layer
from pipeline.interpret.methods import attribution_maps
from pipeline.interpret.pointing_game import localisation_scores, make_grids, summary

GRIDS_AT_ONCE = 4
"""Grids that are explained together."""

QUARTILES = ("q25", "median", "q75")


def play(
    subject: Subject, method: str, layers: Sequence[Layer], n: int
) -> tuple[list[Tensor], int]:
    """Play the game with the maps of ``method`` at each of ``layers``, over the same grids.

    Every process must call it; all get the same scores.

    Args:
        subject: model and split.
        method: whose maps are judged.
        layers: where they are made.
        n: side of the grids, in images.

    Returns:
        scores (G * n²,) of each layer, none if the images do not fill one grid; and G.
    """
    world, predicted, chosen = subject.world, subject.predicted, subject.grids(n)
    mine: list[list[Tensor]] = [[] for _ in layers]
    names = [layer.name for layer in layers]
    samples = chosen[world.rank :: world.size].flatten()
    task = f"localisation {n}x{n}, {method}"
    for images, numbers in subject.select(samples, GRIDS_AT_ONCE * n * n, task):
        grids = make_grids(images.view(-1, n * n, *images.shape[1:]))
        targets = predicted.labels[numbers].view(-1, n * n).to(world.device)
        maps = attribution_maps(method, subject.model, grids, targets, names)
        for scores, name in zip(mine, names, strict=True):
            scores.append(localisation_scores(maps[name], n).flatten().cpu())
    pooled = subject.pool(mine)
    return (pooled if len(chosen) else []), len(chosen)


def score_rows(
    method: str, layers: Sequence[Layer], scores: Sequence[Tensor], grids: int
) -> list[Row]:
    """One row for each layer, once for a junction that is the input; none without scores."""
    if not scores:
        return []
    rows: dict[str, Row] = {}
    for layer, pooled in zip(layers, scores, strict=True):
        place: Row = {"method": method, "layer": layer_title(layer), "distance": layer.distance}
        rows[layer_title(layer)] = {**place, "grids": grids, **summary(pooled)}
    return list(rows.values())


def score_values(name: str, method: str, pooled: Tensor) -> dict[str, float]:
    """Values of scores (N,): their mean as ``name``, and their quartiles as ``name``_q25 ..."""
    return {
        value_name(name, method) + ("" if stat == "mean" else f"_{stat}"): value
        for stat, value in summary(pooled).items()
    }


def with_quartiles(names: Mapping[str, str]) -> dict[str, str]:
    """``names`` of means and what they mean, each followed by its quartiles."""
    every = {}
    for name, meaning in names.items():
        every[name] = meaning
        every |= {f"{name}_{stat}": f"{meaning.split(',')[0]}, {stat}" for stat in QUARTILES}
    return every


def draw_localisation(rows: Sequence[Row], chance: float, path: Path) -> None:
    """Draw one bar from quartile to quartile for each method, best median on top."""
    from pipeline.evaluation.plots import quartile_bars

    ordered = sorted(rows, key=lambda row: row["median"])
    names = [f"{row['method']}\n({row['layer']})" for row in ordered]
    label = "share of positive contributions in the right cell"
    quartile_bars(ordered, names, (0, 1.02), label, chance, path)
