"""The optimiser of a run, with weight decay only where it belongs."""

import torch

# timm re-exports it without saying so.
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from torch import nn

from pipeline.recipe.optimisers import OPTIMISERS
from pipeline.recipe.schema import TrainingRecipe


def build_optimizer(model: nn.Module, training: TrainingRecipe) -> torch.optim.Optimizer:
    """Build the recipe's optimiser; its weight decay spares biases and normalisation.

    Those are the parameters with one dimension.

    muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024)
    orthogonalises the updates of matrices, with everything behind a parameter's first dimension as
    columns, and scales them to the size of AdamW's (Liu et al., arXiv 2502.16982), so that one rate
    fits both. The rest is updated as by AdamW: biases, normalisation, and matrices with fewer than
    4 rows or columns or more than 128 times as many of one as of the other.
    """
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model,
        opt=OPTIMISERS[training.optimizer].timm_name,
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
    )
    return optimizer
