"""Signed contributions of the input, or of any intermediate layer, to a class logit.

Source: Böhle, Fritz, Schiele, "Optimising for Interpretability: Convolutional Dynamic Alignment
    Networks"
(arXiv 2109.13004). With the dynamic weights W held fixed, a CoDA network is linear, so one backward
pass gives s_l = a_l * d(T (logit_c - b0)) / d a_l, which sums to T (logit_c - b0) over the input
and over every CoDA layer l. In a conventional part the same formula takes the gradient through the
network as it is, and nothing is exact.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import UserError

# of a backward pass; memory holds the gradients of as many targets
TARGETS_AT_ONCE = 9


class Parts(NamedTuple):
    """A model as explanations see it: logits = forward_encoded(encode(images)) = (CoDA output) /
    temperature + logit_bias.
    """

    encode: Callable[[Tensor], Tensor]
    forward_encoded: Callable[[Tensor], Tensor]
    temperature: float
    logit_bias: float


def parts(model: nn.Module) -> Parts:
    """The four things explanations ask of a model; a plain model has the identity as its encoding,
    T = 1 and b0 = 0.
    """
    return Parts(
        getattr(model, "encode", lambda images: images),
        getattr(model, "forward_encoded", model),
        getattr(model, "temperature", 1.0),
        getattr(model, "logit_bias", 0.0),
    )


def _is_dynamic(module: nn.Module) -> bool:
    """Whether the module opts in to explanation mode: with ``explaining`` True its backward pass
    holds W fixed.
    """
    return isinstance(getattr(module, "explaining", None), bool)


@contextmanager
def explanation_mode(model: nn.Module, *, fixed_weights: bool = True) -> Iterator[None]:
    """Evaluation mode with all dynamic weights held fixed; restores every module's own flags,
    nested or on error.

    ``fixed_weights=False`` differentiates the dynamic weights as training does, which is what
    post-hoc methods see.
    """
    found = [
        (module, module.training, getattr(module, "explaining", None)) for module in model.modules()
    ]
    try:
        model.eval()
        for module in filter(_is_dynamic, model.modules()):
            module.explaining = fixed_weights  # type: ignore[assignment]
        yield
    finally:
        for module, training, explaining in found:
            module.training = training
            if _is_dynamic(module):
                module.explaining = explaining  # type: ignore[assignment]


def contributions(
    model: nn.Module, images: Tensor, targets: Tensor, at: str | None = None
) -> Tensor:
    """Contributions (B, C_l, H_l, W_l) of one layer to T (logit - b0) of one class per image.

    Args:
        images: (B, 3, H, W), RGB in [0, 1].
        targets: (B,) int64, the class explained in each image.
        at: name of the module whose output is explained; None for the input encoding.

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
    """Contributions of many layers to many classes, from one forward pass and one batched backward
    pass.

    Args:
        images: (B, 3, H, W), RGB in [0, 1].
        targets: (B, K) int64, the K classes explained in each image.
        layers: names of modules, None for the input encoding.
        sum_channels: keep only maps summed over channels, so that memory holds the channels of
            TARGETS_AT_ONCE classes at most.

    Returns:
        By layer: contributions (B, K, C_l, H_l, W_l), or maps (B, K, H_l, W_l) with
        ``sum_channels``.

    Raises:
        UserError: as ``contributions``.
    """
    return _explain(model, images, targets, layers, sum_channels)[1]


def completeness_error(
    model: nn.Module, images: Tensor, targets: Tensor, at: str | None = None
) -> Tensor:
    """|sum s - T (logit - b0)| / sum |s| of each image, (B,) in float64; 0 where all of it is 0,
    infinite where only s is.

    The logit itself carries a rounding error near 1e-7 |b0|, hence T (logit - b0) one near 1e-7 T
    |b0| in float32: to judge a network whose outputs are still small against T, pass it and the
    images in float64.

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
    """T (logit - b0) of the targets, (B, K), and the contributions to it by layer (see
    ``layer_contributions``).
    """
    if targets.ndim != 2 or len(targets) != len(images):
        raise ValueError(
            f"targets must be (B, K) with B = {len(images)} as the images, got {tuple(targets.shape)}"
        )
    encode, forward_encoded, temperature, logit_bias = parts(model)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        explanation_mode(model),
        _captured(model, layers) as activations,
    ):
        # clones, as the caller may evaluate in inference mode, whose tensors autograd refuses
        encoded, targets = encode(images).detach().clone().requires_grad_(), targets.clone()
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

        # images do not interact in evaluation mode, so one backward pass serves all images, and a
        # batched one many targets (K, B, K)
        cotangents = torch.eye(targets.shape[1]).to(outputs)[:, None].expand(-1, len(images), -1)
        found = torch.func.vmap(of_target, out_dims=1, chunk_size=TARGETS_AT_ONCE)(cotangents)
    return outputs.detach(), dict(zip(layers, found, strict=True))


@contextmanager
def _captured(model: nn.Module, layers: Sequence[str | None]) -> Iterator[dict[str | None, Tensor]]:
    """Fills the yielded dict with the outputs of the named modules during a forward pass."""
    activations: dict[str | None, Tensor] = {}
    modules = dict(model.named_modules())

    def capture(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            if name in activations:
                raise UserError(
                    f"module {name!r} runs more than once in a forward pass, so it has no single output to explain"
                )
            if not isinstance(output, Tensor) or output.ndim != 4:
                shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise UserError(
                    f"the output of module {name!r} is {shape}; only maps (B, C, H, W) can be explained"
                )
            activations[name] = output
            # an in-place operation that follows must not change what was captured
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


@dataclass(frozen=True)
class Layer:
    """A place to explain: a module's output, or the input encoding (name None)."""

    name: str | None
    distance: float
    """Share in [0, 1] of the model's parametric layers that run after it."""


def explainable_layers(model: nn.Module, example_images: Tensor) -> list[Layer]:
    """The layers a depth curve visits, from the output back to the input encoding, which comes last
    at distance 1.

    They are the stem and stages that ``model.feature_info`` names, where a stage that is an
    ``nn.Sequential`` stands for its children (its blocks), and besides these every outermost
    dynamic module (DAU convolution) outside of them; of all these the ones that run once and give
    (B, C, H, W), and of several at one distance (a convolution, its normalisation and its
    activation) the last to run, but at distance 1 the encoding. Parametric layers, in the order in
    which one forward pass on ``example_images`` (B, 3, H, W) finishes them, are convolutions,
    linear layers, and dynamic modules as one each, whatever these consist of. A layer's own
    parameters lie before its output, so that the output of the last one has distance 0.
    """
    modules = dict(model.named_modules())
    dynamic = _outermost(name for name, module in modules.items() if _is_dynamic(module))
    candidates = _blocks(model)
    candidates |= {name for name in dynamic if not _within(name, candidates)}
    parametric = dynamic | {
        name
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d | nn.Linear) and not _within(name, dynamic)
    }
    # (name, gives a map) in the order in which the modules finish
    runs: list[tuple[str, bool]] = []

    def record(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: runs.append(
            (name, isinstance(output, Tensor) and output.ndim == 4)
        )

    encode, forward_encoded, *_ = parts(model)
    with ExitStack() as hooks, torch.no_grad(), explanation_mode(model):
        for name in candidates | parametric:
            hooks.enter_context(modules[name].register_forward_hook(record(name)))
        forward_encoded(encode(example_images))
    times = Counter(name for name, _ in runs)
    total = sum(times[name] for name in parametric)
    # by the number of parametric layers that run later
    layers: dict[int, Layer] = {}
    later = 0
    for name, gives_map in reversed(runs):
        if name in candidates and gives_map and times[name] == 1 and later < total:
            layers.setdefault(later, Layer(name, later / total))
        later += name in parametric
    return [*layers.values(), Layer(None, 1.0)]


def exact_layers(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Those of ``layers`` (from ``explainable_layers``) at which contributions are complete: the
    CoDA part and its junction.

    They reach from the output back to the junction, the input of the deepest dynamic module. Where
    there is no dynamic module, only the last features count, which a pooling and a linear layer
    usually follow.
    """
    modules = dict(model.named_modules())
    dynamic = [
        layer.name is not None and any(map(_is_dynamic, modules[layer.name].modules()))
        for layer in layers
    ]
    deepest = max((index for index, is_dynamic in enumerate(dynamic) if is_dynamic), default=-1)
    return list(layers[: deepest + 2])


def _blocks(model: nn.Module) -> set[str]:
    """Names of the stem and of the blocks of the stages in timm's ``feature_info``; empty for a
    model without it.
    """
    names = set()
    for entry in getattr(model, "feature_info", ()):
        stage = model.get_submodule(entry["module"])
        inner = (
            [name for name, _ in stage.named_children()] if isinstance(stage, nn.Sequential) else []
        )
        names |= {f"{entry['module']}.{name}" for name in inner} or {entry["module"]}
    return names


def _within(name: str, others: set[str]) -> bool:
    """Whether the module of this name is one of the others or lies inside one."""
    return any(name == other or name.startswith(f"{other}.") for other in others)


def _outermost(names: Iterator[str]) -> set[str]:
    """The names that lie inside no other; parents come before their children, as in
    ``named_modules``.
    """
    kept: set[str] = set()
    for name in names:
        if not _within(name, kept):
            kept.add(name)
    return kept
