"""Cost of the grid pointing game against backward passes that hold every dynamic weight.

    # 500 grids of 3x3 CIFAR-sized images with coda_s, as published.
    python -m benchmarks.interpret
    # The same numbers per grid, sooner.
    python -m benchmarks.interpret --grids 4

Both sides explain the same random grids of 96 x 96 pixels for all nine classes with the same
weights. The peer is what the method's formula reads as: every layer forms w = A z + b for all units
and positions at once and keeps it for the backward pass (pipeline/models/dau/reference.py). It
comes in two forms: a forward and a backward pass for each class of each grid, as the official code
explains one image and class at a time; and, harder to beat, one forward pass for each grid and a
backward pass for each class. It needs about 2 GiB for one grid and costs the same for each, so it
is timed on a few. Then the cost per grid of this pipeline for growing numbers of grids, and of all
layers of the depth curve against the input alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import Tensor
from tqdm import tqdm

# Registers the models.
import pipeline  # noqa: F401
from pipeline.evaluation.grid_game import GRIDS_AT_ONCE
from pipeline.interpret.contributions import (
    explainable_layers,
    explanation_mode,
    layer_contributions,
    parts,
)
from pipeline.interpret.pointing_game import localisation_scores
from pipeline.models.dau import DAUConv2d
from pipeline.models.dau.reference import twin

CLASSES, SIDE = 9, 96


def ours(model: torch.nn.Module, grids: Tensor, layers: list[str | None]) -> Tensor:
    """Score the grids at the first of ``layers``: (G, 9).

    The contributions of all layers come from one forward and one batched backward pass for a few
    grids.
    """
    scores = []
    for part in tqdm(torch.split(grids, GRIDS_AT_ONCE), desc="ours", leave=False):
        targets = torch.arange(CLASSES).expand(len(part), -1)
        maps = layer_contributions(model, part, targets, layers, sum_channels=True)
        scores.append(localisation_scores(maps[None], 3))
    return torch.cat(scores)


def materialised(model: torch.nn.Module, grids: Tensor, share_forward: bool) -> Tensor:
    """Compute the same scores, a class and grid at a time, with every dynamic weight in memory."""
    scores = []
    encode, forward_encoded, temperature, logit_bias = parts(model)
    dynamic = [module for module in model.modules() if isinstance(module, DAUConv2d)]
    with explanation_mode(model):
        for layer in dynamic:
            # A layer computes as its twin until the end.
            layer.forward = partial(twin, layer)  # type: ignore[method-assign]
        for grid in tqdm(grids, desc="materialised", leave=False):
            encoded = encode(grid[None]).requires_grad_()
            maps = []
            for target in range(CLASSES):
                if target == 0 or not share_forward:
                    outputs = temperature * (forward_encoded(encoded)[0] - logit_bias)
                (gradient,) = torch.autograd.grad(
                    outputs[target], encoded, retain_graph=share_forward
                )
                maps.append((encoded * gradient).detach().sum(1)[0])
            scores.append(localisation_scores(torch.stack(maps)[None], 3))
        for layer in dynamic:
            del layer.forward
    return torch.cat(scores)


def timed(run: Callable[[], Tensor], repeats: int) -> tuple[float, float, Tensor]:
    """Measure the median seconds of a run and their spread (largest less smallest).

    The result of the last run comes third.
    """
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), max(seconds) - min(seconds), result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grids", type=int, default=500)
    parser.add_argument(
        "--peer-grids", type=int, default=2, help="grids on which the peer is timed"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", type=int, help="base rank of coda_s (default: as published, 32)")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model("coda_s", rank=options.rank).eval()
    grids = torch.rand(max(options.grids, options.peer_grids), 3, SIDE, SIDE)
    layers = [layer.name for layer in explainable_layers(model, grids[:1])]

    few = grids[: options.peer_grids]
    found = ours(model, few, [None])
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"coda_s rank {options.rank or 32}, {options.repeats} runs each"
    )
    print(
        "\n| what | grids | seconds per grid (spread) | forward per class / this "
        "| shared forward / this |\n|---|---|---|---|---|"
    )
    rows, peers = [], []
    for share, name in (
        (False, "materialised, forward and backward per class"),
        (True, "materialised, shared forward, backward per class"),
    ):
        seconds, spread, expected = timed(partial(materialised, model, few, share), options.repeats)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        rows.append((name, len(few), seconds, spread))
        peers.append(seconds / len(few))
    counts = sorted({max(1, options.grids // 4), max(1, options.grids // 2), options.grids})
    at_input: list[str | None] = [None]
    for count, places, name in [
        *((count, at_input, "this pipeline, input") for count in counts),
        (counts[0], layers, "this pipeline, all layers"),
    ]:
        run = partial(ours, model, grids[:count], places)
        seconds, spread, _ = timed(run, options.repeats)
        rows.append((name, count, seconds, spread))
    for name, count, seconds, spread in rows:
        ratios = " | ".join(f"{peer * count / seconds:.1f}" for peer in peers)
        print(f"| {name} | {count} | {seconds / count:.3f} ({spread / count:.3f}) | {ratios} |")


if __name__ == "__main__":
    main()
