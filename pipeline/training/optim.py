"""Optimiser and learning rate. The rate is a pure function of the number of updates done, set before every update."""

import math

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from pipeline.recipe import TrainingRecipe


def build_optimizer(model: nn.Module, training: TrainingRecipe) -> torch.optim.Optimizer:
    """The recipe's optimiser; weight decay spares biases and normalisation (one-dimensional parameters)."""
    return create_optimizer_v2(
        model, opt=training.optimizer, lr=training.learning_rate, weight_decay=training.weight_decay, momentum=training.momentum
    )


def learning_rate(update: int, updates_per_epoch: int, training: TrainingRecipe) -> float:
    """Rate of update number ``update`` (from 0): linear warm-up over ``warmup_epochs``, then half a cosine down to 0."""
    total = training.epochs * updates_per_epoch
    warmup = round(training.warmup_epochs * updates_per_epoch)
    if update < warmup:
        return training.learning_rate * (update + 1) / warmup
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(total - warmup, 1)))
