"""Training losses on soft targets. All are sums over classes and means over images."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of logits (B, C) and targets (B, C)."""


def soft_targets(classes: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Make targets (B, C) float; of each, ``smoothing`` is spread evenly over all classes.

    Args:
        classes: labels (B,) int64 or, of mixed images, the share of each class (B, C).
        num_classes: C.
        smoothing: in [0, 1).
    """
    shares = F.one_hot(classes, num_classes).float() if classes.ndim == 1 else classes
    return shares.mul(1 - smoothing).add_(smoothing / num_classes)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of every class against its target, the loss of CoDA networks.

    Source: arXiv 2109.13004, section 4. logits (B, C), targets (B, C) in [0, 1] -> scalar.
    """
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)


LOSSES: dict[str, Loss] = {"bce": binary_cross_entropy, "cross_entropy": F.cross_entropy}
