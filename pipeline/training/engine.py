"""DeepSpeed: its configuration, derived from the recipe, and the engine of a training run."""

import functools
import logging
import os
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.distributed import World
from pipeline.recipe.schema import Recipe

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@functools.cache
def load_deepspeed() -> ModuleType:
    """Import DeepSpeed, once per process, in an open process group, whose variables it reads.

    Raises:
        ImportError: it is not installed, or cannot work here.
    """
    # It imports MLflow.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    module: ModuleType = deepspeed
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # None of DeepSpeed's own operators is used. On a processor it would compile one for inference
    # as soon as it starts, with a compiler and ninja, into the home.
    deepspeed.ops.__compatible_ops__ = {}
    return module


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


def build_engine(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> "DeepSpeedEngine":
    """Put ``model`` and ``optimizer`` under DeepSpeed, in the process group that is open."""
    deepspeed = load_deepspeed()
    from deepspeed.utils import groups

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
