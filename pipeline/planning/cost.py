"""What the networks cost, beside the ResNet that each is compared with.

Parameters, multiply-adds and memory for the backward pass are counted on the meta device, where
tensors have shapes and no values; CPU time is measured.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.models.dau import DAUConv2d

SMALL_IMAGES = 32
"""Side in pixels up to which a pure network is compared with a ResNet for small images."""


@dataclass(frozen=True)
class Cost:
    """What a network needs for one image."""

    parameters: int
    """Their number."""
    multiply_adds: int
    """Of a forward pass."""
    activation_bytes: int
    """Kept from the forward for the backward pass."""


def dau_multiply_adds(layer: DAUConv2d, positions: int) -> int:
    """Multiply-adds of a DAU convolution at ``positions`` positions.

    They are those of z = B x; of A_o^T x with every unit's <., z> and <b_o, x>; and, where g needs
    |w_o|, of R_o [z, 1] (see chunked.py).
    """
    units, fan_in, rank = layer.up_weight.shape
    biased = rank + (layer.up_bias is not None)
    per_unit = fan_in * biased + rank
    if layer.norm != "wb":
        per_unit += min(fan_in, biased) * biased
    return positions * (fan_in * rank + units * per_unit)


def _multiply_adds(layer: nn.Module, output: Tensor) -> int:
    if isinstance(layer, DAUConv2d):
        return dau_multiply_adds(layer, output[:, 0].numel())
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    return output.numel() * layer.weight[0].numel()


def cost(model: nn.Module, input_size: Sequence[int]) -> Cost:
    """Count ``model``, on the meta device, for one image of ``input_size`` (C, H, W)."""
    # By storage. The tensors are held so that a storage's number is not used again.
    saved: dict[int, Tensor] = {}
    counted: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    dynamic = [module for module in model.modules() if isinstance(module, DAUConv2d)]
    inner = {id(part) for module in dynamic for part in module.children()}
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, DAUConv2d | nn.Conv2d | nn.Linear) and id(module) not in inner:
                hook = module.register_forward_hook(
                    lambda layer, _, output: counted.append(_multiply_adds(layer, output))
                )
                stack.callback(hook.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        model.train()(torch.empty(1, *input_size, device="meta"))
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    activations = sum(
        tensor.untyped_storage().nbytes() for number, tensor in saved.items() if number not in own
    )
    return Cost(
        sum(parameter.numel() for parameter in model.parameters()), sum(counted), activations
    )


def seconds(model: nn.Module, input_size: Sequence[int], repeats: int = 3) -> float:
    """CPU time of a forward and backward pass on one image, without that of other processes.

    It is the best of ``repeats`` passes, after one to warm up.
    """
    images = torch.rand(1, *input_size, generator=torch.Generator().manual_seed(0))
    model.train()
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        model(images).sum().backward()
        times.append(time.process_time() - start)
    return min(times[1:])


def peer(name: str) -> str:
    """Return the name of the plain ResNet that the network ``name`` is compared with.

    That of a hybrid is the one it comes from, that of a pure network one for images of its size.
    """
    plain = name.removeprefix("coda_")
    if timm.is_model(plain):
        return plain
    described = timm.get_pretrained_cfg(name)
    small = described is not None and described.input_size[-1] <= SMALL_IMAGES
    return "resnet20" if small else "resnet18"


def table(names: Sequence[str], *, timed: bool) -> str:
    """Return a Markdown table of this family's networks ``names`` at their default sizes.

    Every junction of a hybrid has a row, and the default one is bold. Ratios are to the plain
    ResNet at the same input size and number of classes. With ``timed`` there is a last column,
    which is measured.
    """
    header = [
        "model",
        "conv_stages",
        "parameters, M",
        "ratio",
        "multiply-adds, M",
        "ratio",
        "activations, MB / image",
        "ratio",
    ]
    header += ["CPU time, ratio"] if timed else []
    rows = [header, ["---"] * len(header)]
    for name in tqdm(names, desc="counting", unit="network"):
        default: Any = timm.create_model(name, device="meta")
        size, classes = default.default_cfg["input_size"], default.num_classes
        base, base_seconds = _measure(peer(name), size, timed, num_classes=classes)
        for args, label in _junctions(default):
            own, own_seconds = _measure(name, size, timed, **args)
            row = [f"`{name}`", label]
            for count, of, digits in (
                (own.parameters, base.parameters, 2),
                (own.multiply_adds, base.multiply_adds, 0),
                (own.activation_bytes, base.activation_bytes, 1),
            ):
                row += [f"{count / 1e6:,.{digits}f}", f"{count / of:.2f}"]
            rows.append(row + ([f"{own_seconds / base_seconds:.1f}"] if timed else []))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _junctions(default: Any) -> Iterator[tuple[dict[str, int], str]]:
    """Yield arguments and label of every junction of a hybrid; for a pure network, of itself."""
    if not hasattr(default, "conv_stages"):
        yield {}, "–"
        return
    # The stem is a stage, too.
    for conv_stages in range(len(default.stage_names)):
        is_default = conv_stages == default.conv_stages
        yield {"conv_stages": conv_stages}, f"**{conv_stages}**" if is_default else str(conv_stages)


def _measure(name: str, size: Sequence[int], timed: bool, **args: Any) -> tuple[Cost, float]:
    counted = cost(timm.create_model(name, device="meta", **args), size)
    measured = seconds(timm.create_model(name, **args), size) if timed else 0.0
    return counted, measured
