"""From a recipe to a DeepSpeed engine. The recipe owns every number; DeepSpeed's configuration is
derived from it.
"""

import logging
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from torch import nn

from pipeline.distributed import World
from pipeline.recipe.schema import Recipe

deepspeed.utils.logger.setLevel(logging.WARNING)
# Of DeepSpeed's own operators none is used here, and none counts as compatible: on a processor it
# would compile one for inference as soon as it starts, with a compiler and ninja, into the home.
deepspeed.ops.__compatible_ops__ = {}


def configuration(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for ``recipe`` on ``world_size`` processes.

    bf16 is autocast with fp32 parameters, and an empty list of low-precision modules keeps the
    reduction of gradients in fp32 (DeepSpeed would otherwise reduce those of convolutions in bf16).
    """
    micro_batch, accumulation = recipe.micro_batch(world_size)
    configuration: dict[str, Any] = {
        "train_batch_size": recipe.training.global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.training.clip_grad_norm,
        "zero_optimization": {"stage": recipe.training.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    if recipe.training.precision == "bf16":
        configuration["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return configuration


def build(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> deepspeed.DeepSpeedEngine:
    """``model`` and ``optimizer`` under DeepSpeed, in the process group that is open already."""
    if groups._WORLD_GROUP is None:
        # DeepSpeed reduces gradients in a group of its own, to which it gives torch's default
        # timeout, 10 or 30 minutes.
        groups._WORLD_GROUP = torch.distributed.new_group(
            timeout=timedelta(seconds=world.timeout_seconds)
        )
    config = configuration(recipe, world.size)
    engine, *_ = deepspeed.initialize(
        model=model.to(world.device), optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine
