"""Signed contributions of the input, or of any intermediate layer, to a class logit.

Source: Böhle, Fritz, Schiele, "Optimising for Interpretability: Convolutional Dynamic Alignment
Networks" (arXiv 2109.13004). With the dynamic weights W held fixed, a CoDA network is linear, so
one backward pass gives s_l = a_l * d(T (logit_c - b0)) / d a_l, which sums to T (logit_c - b0) over
the input and over every CoDA layer l. In a conventional part the same formula takes the gradient
through the network as it is, and nothing is exact.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.interpret.layers import Layer, exact_layers, explainable_layers
from pipeline.interpret.network import Parts, explanation_mode, parts

__all__ = [
    "Layer",
    "Parts",
    "completeness_error",
    "contributions",
    "exact_layers",
    "explainable_layers",
    "explanation_mode",
    "layer_contributions",
    "parts",
]

# Targets of one backward pass, whose gradients memory holds at once.
TARGETS_AT_ONCE = 9


def contributions(
    model: nn.Module, images: Tensor, targets: Tensor, at: str | None = None
) -> Tensor:
    """Compute the contributions of one layer to T (logit - b0) of one class per image.

    >>> import pipeline, timm, torch
    >>> model = timm.create_model("coda_xs", num_classes=10)
    >>> images, targets = torch.rand(2, 3, 32, 32), torch.tensor([3, 7])
    >>> terms = contributions(model, images, targets)
    >>> terms.shape  # The network reads six channels, [x, 1 - x].
    torch.Size([2, 6, 32, 32])
    >>> logits = model.eval()(images)[[0, 1], targets]
    >>> expected = model.temperature * (logits - model.logit_bias)
    >>> torch.allclose(terms.sum((1, 2, 3)), expected, rtol=1e-3, atol=1e-2)
    True

    Args:
        model: any classifier; its flags and gradients are left as they are.
        images: (B, 3, H, W), RGB in [0, 1].
        targets: (B,) int64, the class explained in each image.
        at: name of the module whose output is explained; None for the input encoding.

    Returns:
        (B, C_l, H_l, W_l), signed.

    Raises:
        UserError: no module has this name, or its output is not one (B, C, H, W) tensor per pass.
    """
    return layer_contributions(model, images, targets[:, None], [at])[at][:, 0]


def layer_contributions(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    layers: Sequence[str | None],
    *,
    sum_channels: bool = False,
) -> dict[str | None, Tensor]:
    """Compute the contributions of many layers to many classes.

    They come from one forward pass and one batched backward pass.

    Args:
        model: any classifier.
        images: (B, 3, H, W), RGB in [0, 1].
        targets: (B, K) int64, the K classes explained in each image.
        layers: names of modules, None for the input encoding.
        sum_channels: keep only maps summed over channels, so that memory holds the channels of
            TARGETS_AT_ONCE classes at most.

    Returns:
        Contributions (B, K, C_l, H_l, W_l), or maps (B, K, H_l, W_l) with ``sum_channels``, by the
        layer's name.

    Raises:
        UserError: as ``contributions``.
    """
    return _explain(model, images, targets, layers, sum_channels)[1]


def completeness_error(
    model: nn.Module, images: Tensor, targets: Tensor, at: str | None = None
) -> Tensor:
    """Compute |sum s - T (logit - b0)| / sum |s| of each image.

    The logit itself carries a rounding error near 1e-7 |b0|, hence T (logit - b0) one near 1e-7 T
    |b0| in float32. To judge a network whose outputs are still small against T, pass it and the
    images in float64.

    Args:
        model: as in ``contributions``.
        images: as in ``contributions``.
        targets: as in ``contributions``.
        at: as in ``contributions``.

    Returns:
        (B,) in float64; 0 where the logit and all s are 0, infinite where only all s are.

    Raises:
        UserError: as ``contributions``.
    """
    outputs, by_layer = _explain(model, images, targets[:, None], [at], sum_channels=False)
    terms = by_layer[at].flatten(1).double()  # (B, C * H * W)
    error = (terms.sum(1) - outputs[:, 0].double()).abs()
    return torch.where(error == 0, error, error / terms.abs().sum(1))


def _explain(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    layers: Sequence[str | None],
    sum_channels: bool,
) -> tuple[Tensor, dict[str | None, Tensor]]:
    """Compute T (logit - b0) of the targets, (B, K), and the contributions to it by layer."""
    if targets.ndim != 2 or len(targets) != len(images):
        raise ValueError(
            f"targets must be (B, K) with B = {len(images)} as the images, "
            f"got {tuple(targets.shape)}"
        )
    encode, forward_encoded, temperature, logit_bias = parts(model)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        explanation_mode(model),
        _captured(model, layers) as activations,
    ):
        # Clones, as the caller may evaluate in inference mode, whose tensors autograd refuses.
        encoded = encode(images).detach().clone().requires_grad_()
        targets = targets.clone()
        logits = forward_encoded(encoded.clone())
        activations[None] = encoded
        for layer in layers:
            if layer not in activations:
                raise UserError(
                    f"module {layer!r} does not run in a forward pass, so it has no contributions"
                )
        chosen = [activations[layer] for layer in layers]
        outputs = temperature * (logits.gather(1, targets) - logit_bias)  # (B, K)

        def of_target(cotangent: Tensor) -> tuple[Tensor, ...]:
            gradients = torch.autograd.grad(
                outputs, chosen, cotangent, retain_graph=True, materialize_grads=True
            )
            products = (
                activation.detach() * gradient
                for activation, gradient in zip(chosen, gradients, strict=True)
            )
            return tuple(product.sum(1) if sum_channels else product for product in products)

        # Images do not interact in evaluation mode, so one backward pass serves all images, and a
        # batched one many targets.
        one_hot = torch.eye(targets.shape[1]).to(outputs)
        cotangents = one_hot[:, None].expand(-1, len(images), -1)  # (K, B, K)
        found = torch.func.vmap(of_target, out_dims=1, chunk_size=TARGETS_AT_ONCE)(cotangents)
    return outputs.detach(), dict(zip(layers, found, strict=True))


@contextmanager
def _captured(model: nn.Module, layers: Sequence[str | None]) -> Iterator[dict[str | None, Tensor]]:
    """Collect the outputs of the named modules in the yielded dict during a forward pass."""
    activations: dict[str | None, Tensor] = {}
    modules = dict(model.named_modules())

    def capture(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            if name in activations:
                raise UserError(
                    f"module {name!r} runs more than once in a forward pass, "
                    f"so it has no single output to explain"
                )
            if not isinstance(output, Tensor) or output.ndim != 4:
                shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise UserError(
                    f"the output of module {name!r} is {shape}; "
                    f"only maps (B, C, H, W) can be explained"
                )
            activations[name] = output
            # An in-place operation that follows must not change what was captured.
            return output.clone()

        return hook

    with ExitStack() as hooks:
        for name in {layer for layer in layers if layer is not None}:
            if name not in modules:
                close = difflib.get_close_matches(name, modules) or list(modules)[1:6]
                raise UserError(
                    f"the model has no module {name!r}; nearest names: {', '.join(close)}"
                )
            hooks.enter_context(modules[name].register_forward_hook(capture(name)))
        yield activations
