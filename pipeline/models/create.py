"""A network from timm's name of it and keyword arguments, with mistakes told in one line."""

import difflib
from collections.abc import Mapping
from typing import Any, Protocol

import timm
from torch import nn

from pipeline.errors import UserError

# Arguments that only decide the weights a model starts with.
WEIGHT_SOURCES = ("pretrained", "pretrained_backbone")


class NamedModel(Protocol):
    """A choice of model, such as a recipe's."""

    @property
    def name(self) -> str:
        """The name that timm knows the model by."""

    @property
    def args(self) -> Mapping[str, Any]:
        """Keyword arguments of ``timm.create_model``."""


def create(
    name: str, args: Mapping[str, Any], num_classes: int, *, fresh: bool = True
) -> nn.Module:
    """Call ``timm.create_model(name, num_classes=num_classes, **args)``.

    Args:
        name: of a timm model.
        args: keyword arguments of the model.
        num_classes: number of logits.
        fresh: False if trained weights will be loaded, so that pretrained ones need not be there
            any more.

    Raises:
        UserError: the name is unknown, the model does not take one of the arguments, or pretrained
            weights do not fit.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        close = close or timm.list_models("coda_*")
        raise UserError(f"model.name {name!r} is not a timm model; nearest: {', '.join(close)}")
    used = {key: value for key, value in args.items() if fresh or key not in WEIGHT_SOURCES}
    try:
        return timm.create_model(name, num_classes=num_classes, **used)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if not _is_about_arguments(error, args):
            raise
        raise UserError(
            f"model {name} cannot be built with model.args {dict(args)}: {error}"
        ) from error


def build_model(model: NamedModel, num_classes: int, *, fresh: bool = True) -> nn.Module:
    """Create the model that a recipe names; see :func:`create`."""
    return create(model.name, model.args, num_classes, fresh=fresh)


def _is_about_arguments(error: Exception, args: Mapping[str, Any]) -> bool:
    """Whether a model refuses one of ``args``, or weights that they name do not fit."""
    if isinstance(error, TypeError):
        return any(f"unexpected keyword argument '{name}'" in str(error) for name in args)
    if isinstance(error, RuntimeError):
        return str(error).startswith(
            ("Error(s) in loading state_dict", "No pretrained weights exist")
        )
    # timm asserts, and the models of this project raise ValueError.
    return bool(args)
