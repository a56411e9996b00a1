"""The subject of an evaluation: a model, a split, and the predictions that all metrics share.

Every image counts exactly once for any number of processes. Properties that need all processes are
computed by all of them together, the first time that a metric asks.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.data.epoch_loader import EpochLoader, unit_range
from pipeline.distributed import World, gather_across_ranks, sum_across_ranks
from pipeline.interpret.contributions import Layer, explainable_layers
from pipeline.interpret.pointing_game import choose_grids
from pipeline.recipe.schema import Recipe

Item = TypeVar("Item")


class Predictions(NamedTuple):
    """Predictions for the whole split, in the order of its samples."""

    labels: Tensor
    """(N,) int64."""
    predictions: Tensor
    """(N,) int64, the strongest class of each sample."""
    label_logits: Tensor
    """(N,), the logit of each sample's own label."""
    sums: Tensor
    """(3,): loss, top-1 hits and top-5 hits, over all images of all processes."""


@dataclass(frozen=True)
class Subject:
    """The model, in evaluation mode, and the split it is evaluated on."""

    model: nn.Module
    recipe: Recipe
    loader: EpochLoader
    world: World
    _grids: dict[int, Tensor] = field(default_factory=dict)
    """Grids chosen so far, by side."""

    @cached_property
    def predicted(self) -> Predictions:
        """Predictions for every image. Every process must ask."""
        return _predict(self)

    @cached_property
    def layers(self) -> list[Layer]:
        """Layers that can be explained, from the output back to the input."""
        size = self.recipe.data.evaluated_size
        return explainable_layers(
            self.model, torch.zeros(1, 3, size, size, device=self.world.device)
        )

    def grids(self, n: int) -> Tensor:
        """Samples (G, n²) of the n x n grids of the pointing game, the same for every method.

        Every process must ask.
        """
        if n not in self._grids:
            predicted = self.predicted
            generator = torch.Generator().manual_seed(self.recipe.seed)
            wanted = self.recipe.evaluation.grids
            about = (predicted.label_logits, predicted.labels, predicted.predictions)
            chosen = choose_grids(*about, n, wanted, generator) if self.world.is_main else None
            self._grids[n] = gather_across_ranks(chosen)[0]
        return self._grids[n]

    def share(self, count: int) -> Tensor:
        """This process's share of the first ``count`` samples, or of all if there are fewer."""
        return torch.arange(self.world.rank, min(count, self.loader.samples), self.world.size)

    def select(self, samples: Tensor, size: int, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``samples`` in order, ``size`` at a time, with a progress bar named ``what``.

        Yields:
            images (B, 3, H, W) in [0, 1] on the device, and their numbers (B,).
        """
        with self.loader.select(samples.numpy()) as batches:
            images = (image for batch in batches for image in batch.images)
            begins = range(0, len(samples), size)
            for begin in self.progress(begins, math.ceil(len(samples) / size), what):
                numbers = samples[begin : begin + size]
                selected = torch.stack([next(images) for _ in numbers])
                yield unit_range(selected, self.world.device), numbers

    def progress(self, iterable: Iterable[Item], total: int, what: str) -> Iterable[Item]:
        """``iterable`` with a bar on the main process's stderr."""
        bar: Iterable[Item] = tqdm(
            iterable, total=total, desc=what, leave=False, disable=not self.world.is_main
        )
        return bar

    def pool(self, mine: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Join the pieces (n,) of each entry of ``mine`` over all processes into one tensor."""
        parts = gather_across_ranks(
            [torch.cat(list(pieces)) if pieces else torch.zeros(0) for pieces in mine]
        )
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


@torch.no_grad()
def _predict(subject: Subject) -> Predictions:
    world, loader = subject.world, subject.loader
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    rows: list[Tensor] = []
    with loader.epoch(0) as batches:
        for batch in subject.progress(batches, loader.batches_per_epoch, "evaluate"):
            labels = batch.labels.to(world.device)
            logits = subject.model(unit_range(batch.images, world.device)).float()
            ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            one_hot = nn.functional.one_hot(labels, logits.shape[1]).float()
            loss = nn.functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="sum")
            sums += torch.stack([loss.double(), ranked[:, 0].sum(), ranked.any(1).sum()])
            own = logits.gather(1, labels[:, None])[:, 0]
            columns = [batch.indices, batch.labels, logits.argmax(1).cpu(), own.cpu()]
            rows.append(torch.stack([column.double() for column in columns]))
    mine = torch.cat(rows, dim=1) if rows else torch.zeros(4, 0, dtype=torch.float64)
    table = torch.cat(gather_across_ranks(mine), dim=1)  # (4, N)
    table = table[:, table[0].argsort()]
    if table.shape[1] != loader.samples:
        raise RuntimeError(f"{table.shape[1]} of {loader.samples} images were evaluated")
    return Predictions(
        table[1].long(), table[2].long(), table[3].float(), sum_across_ranks(sums).cpu()
    )
