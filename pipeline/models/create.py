"""A model from a recipe's name and arguments."""

import difflib
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from pipeline.errors import UserError
from pipeline.recipe.schema import ModelRecipe

# arguments that only decide the weights a model starts with
WEIGHT_SOURCES = ("pretrained", "pretrained_backbone")


def build_model(model: ModelRecipe, num_classes: int, *, fresh: bool = True) -> nn.Module:
    """``timm.create_model(name, num_classes=num_classes, **args)``.

    Args:
        fresh: False if trained weights will be loaded, so that no pretrained ones need to be there
            any more.

    Raises:
        UserError: unknown name, arguments the model does not take, or pretrained weights that do
            not fit.
    """
    if not timm.is_model(model.name):
        close = difflib.get_close_matches(model.name, timm.list_models(), n=3) or timm.list_models(
            "coda_*"
        )
        raise UserError(
            f"model.name {model.name!r} is not a timm model; nearest: {', '.join(close)}"
        )
    args = {key: value for key, value in model.args.items() if fresh or key not in WEIGHT_SOURCES}
    try:
        return timm.create_model(model.name, num_classes=num_classes, **args)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if not _about_arguments(error, model.args):
            raise
        raise UserError(
            f"model {model.name} cannot be built with model.args {dict(model.args)}: {error}"
        ) from error


def _about_arguments(error: Exception, args: Mapping[str, Any]) -> bool:
    """Whether a model, which was given ``args``, refuses one of them, or weights that they name do
    not fit.
    """
    if isinstance(error, TypeError):
        return any(f"unexpected keyword argument '{name}'" in str(error) for name in args)
    if isinstance(error, RuntimeError):
        return str(error).startswith(
            ("Error(s) in loading state_dict", "No pretrained weights exist")
        )
    # timm asserts, and our models raise ValueError
    return bool(args)
