"""Training losses. All are sums over classes and means over images."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy of every class against the one-hot target, the loss of CoDA networks (arXiv 2109.13004, section 4).

    logits (B, C), labels (B,) int64 -> scalar.
    """
    targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)


LOSSES: dict[str, Loss] = {"bce": binary_cross_entropy, "cross_entropy": F.cross_entropy}
