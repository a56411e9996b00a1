"""What explanations ask of a model, by duck typing only: its parts and its dynamic modules.

A dynamic module computes its weights from its input. It opts in to explanation mode by an attribute
``explaining``: while it is True, a backward pass holds these weights fixed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, cast

from torch import Tensor, nn


class Parts(NamedTuple):
    """A model as explanations see it.

    logits = forward_encoded(encode(images)) = (CoDA output) / temperature + logit_bias.
    """

    encode: Callable[[Tensor], Tensor]
    """Images (B, 3, H, W) to what the first layer reads, (B, C, H, W)."""
    forward_encoded: Callable[[Tensor], Tensor]
    """Encoded images to logits (B, classes)."""
    temperature: float
    """T."""
    logit_bias: float
    """b0."""


def parts(model: nn.Module) -> Parts:
    """Find the parts of a model; a plain one has no encoding, T = 1 and b0 = 0."""
    return Parts(
        getattr(model, "encode", lambda images: images),
        getattr(model, "forward_encoded", model),
        getattr(model, "temperature", 1.0),
        getattr(model, "logit_bias", 0.0),
    )


class Encoded(nn.Module):
    """A model from its encoding on: encoded images to one logit per class."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, encoded: Tensor) -> Tensor:
        """Compute the logits (B, classes) of encoded images (B, C, H, W)."""
        return parts(self.model).forward_encoded(encoded)


class Dynamic(Protocol):
    """The side of a dynamic module that explanations use."""

    explaining: bool
    """Whether a backward pass holds the dynamic weights fixed."""


def is_dynamic(module: nn.Module) -> bool:
    """Whether a module opts in to explanation mode."""
    return isinstance(getattr(module, "explaining", None), bool)


def dynamic_modules(model: nn.Module) -> list[nn.Module]:
    """List the dynamic modules of a model, in the order of ``model.modules()``."""
    return [module for module in model.modules() if is_dynamic(module)]


@contextmanager
def explaining(modules: Iterable[nn.Module], *, fixed_weights: bool = True) -> Iterator[None]:
    """Hold the weights of the dynamic ones among ``modules`` fixed during backward passes.

    The end of the block, by an error too, gives each module back the flag that it had.

    Args:
        modules: others than dynamic ones are left alone.
        fixed_weights: False differentiates the dynamic weights, as training does.
    """
    dynamic = [cast(Dynamic, module) for module in modules if is_dynamic(module)]
    before = [module.explaining for module in dynamic]
    try:
        for module in dynamic:
            module.explaining = fixed_weights
        yield
    finally:
        for module, flag in zip(dynamic, before, strict=True):
            module.explaining = flag


@contextmanager
def explanation_mode(model: nn.Module, *, fixed_weights: bool = True) -> Iterator[None]:
    """Evaluate ``model`` with all dynamic weights held fixed during backward passes.

    The end of the block, by an error too, gives each module back the flags that it had; blocks may
    be nested.

    Args:
        model: of any kind; one without dynamic modules is put in evaluation mode.
        fixed_weights: False differentiates the dynamic weights, as training does. This is what
            post-hoc methods see.
    """
    training = [(module, module.training) for module in model.modules()]
    try:
        with explaining(model.modules(), fixed_weights=fixed_weights):
            model.eval()
            yield
    finally:
        for module, flag in training:
            module.training = flag
