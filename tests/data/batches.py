"""Batches of a loader, read, joined and compared."""

import torch

from pipeline.data.epoch_loader import Batch, EpochLoader


def read(loader: EpochLoader, epoch: int = 0, start: int = 0) -> list[Batch]:
    """Read the batches of an epoch from number ``start`` on."""
    with loader.epoch(epoch, start) as batches:
        return list(batches)


def joined(batches: list[Batch]) -> Batch:
    """Join batches to one."""
    return Batch(
        *(None if parts[0] is None else torch.cat(parts) for parts in zip(*batches, strict=True))
    )


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    """Check that two lists of batches are equal, bit by bit."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a is b is None or torch.equal(a, b)
