"""A model from a recipe's name and arguments."""

import difflib

import timm
from torch import nn

from pipeline.errors import UserError
from pipeline.recipe import ModelRecipe


def build_model(model: ModelRecipe, num_classes: int) -> nn.Module:
    """``timm.create_model(name, num_classes=num_classes, **args)``.

    Raises:
        UserError: unknown name, or arguments the model does not take.
    """
    if not timm.is_model(model.name):
        close = difflib.get_close_matches(model.name, timm.list_models(), n=3) or timm.list_models("coda_*")
        raise UserError(f"model.name {model.name!r} is not a timm model; nearest: {', '.join(close)}")
    try:
        return timm.create_model(model.name, num_classes=num_classes, **model.args)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"model {model.name} cannot be built with model.args {dict(model.args)}: {error}") from error
