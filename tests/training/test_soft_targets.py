"""Losses of mixed images, whose targets are shares of several classes."""

import pytest
import torch

from pipeline.training.losses import LOSSES, soft_targets


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_shared_targets_is_the_shared_loss(name):
    generator = torch.Generator().manual_seed(0)
    logits, share = torch.randn(6, 4, generator=generator), torch.rand(6, generator=generator)
    first, second = torch.randint(0, 4, (2, 6), generator=generator)
    targets = torch.zeros(6, 4)
    targets[range(6), first] += share
    targets[range(6), second] += 1 - share
    alone = [
        torch.stack(
            [
                LOSSES[name](logits[i : i + 1], soft_targets(labels[i : i + 1], 4, 0.1))
                for i in range(6)
            ]
        )
        for labels in (first, second)
    ]
    # Both losses are linear in the targets.
    expected = (share * alone[0] + (1 - share) * alone[1]).mean()
    torch.testing.assert_close(LOSSES[name](logits, soft_targets(targets, 4, 0.1)), expected)
