"""Optimiser and learning rate. The rate is a pure function of the number of updates done, set
before every update.
"""

import math

import torch

# timm re-exports it without saying so.
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from torch import nn

from pipeline.recipe.optimisers import OPTIMISERS
from pipeline.recipe.schema import TrainingRecipe


def build_optimizer(model: nn.Module, training: TrainingRecipe) -> torch.optim.Optimizer:
    """Build the recipe's optimiser; weight decay spares one-dimensional parameters.

    Those are biases and normalisation.

    muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024)
    orthogonalises the updates of matrices, with everything behind a parameter's first dimension as
    columns, and scales them to the size of AdamW's (Liu et al., arXiv 2502.16982), so that one rate
    fits both. The rest is updated as by AdamW: biases, normalisation, and matrices with fewer than
    4 rows or columns or more than 128 times as many of one as of the other.
    """
    return create_optimizer_v2(
        model,
        opt=OPTIMISERS[training.optimizer].timm_name,
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
    )


def learning_rate(update: int, updates_per_epoch: int, training: TrainingRecipe) -> float:
    """Rate of update number ``update`` (from 0): a linear warm-up over ``warmup_epochs``, then the
    recipe's schedule.
    """
    peak = training.learning_rate
    total = training.epochs * updates_per_epoch
    warmup = round(training.warmup_epochs * updates_per_epoch)
    if update < warmup:
        start = training.warmup_learning_rate
        return start + (peak - start) * (update + 1) / warmup
    if training.schedule == "step":
        return peak / training.step_factor ** (update // updates_per_epoch // training.step_epochs)
    progress = (update - warmup) / max(total - warmup, 1)
    return peak * (
        1 - progress if training.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    )
