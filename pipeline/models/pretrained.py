"""Weights from elsewhere: a ResNet's for a hybrid, and checkpoints for other channels or classes.

A pretrained ResNet reads (x - mean) / std; a hybrid reads [x, 1 - x]. Since

    w (x - mean) / std  =  [w (1 - mean) / std] x  -  [w mean / std] (1 - x),

a first convolution with these two halves gives the same output for every image. It does so at the
borders, too: there the ResNet pads its normalised image with 0, and the hybrid both halves of its
encoding.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import adapt_input_conv, load_state_dict
from torch import Tensor, nn

State = dict[str, Tensor]
# Endings of files that hold weights.
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
# What torch, safetensors, timm and the hub raise on weights that are damaged or cannot be fetched.
UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    UnpicklingError,
    SafetensorError,
)
FIRST_CONV = "stem.conv1.weight"


def load_backbone(model: nn.Module, source: str, conv_stages: int) -> None:
    """Copy the stem and conventional stages of a ResNet, with its normalisation statistics.

    Args:
        model: a hybrid whose parameters are named stem.conv1, stem.bn1, stage1, ...; in_chans other
            than 3 is adapted as timm does.
        source: name of a timm model, such as "resnet50.a1_in1k", that timm fetches; or a file
            (.safetensors, .pth) of such a model, taken to have ImageNet's mean and std, or of this
            project's `resnet20` or `resnet56`, which read [0, 1].
        conv_stages: stages to copy.

    Raises:
        ValueError: the source cannot be read, or is not a ResNet of this shape; one line.
    """
    state, mean, std = _read(source)
    if state.get(FIRST_CONV, torch.empty(0)).ndim == 4 and state[FIRST_CONV].shape[1] == len(mean):
        state[FIRST_CONV] = _on_encoding(state[FIRST_CONV], mean, std)
        state[FIRST_CONV] = _adapt_halves(
            state[FIRST_CONV], model.state_dict()[FIRST_CONV].shape[1] // 2
        )
    parts = ("stem.", *(f"stage{number}." for number in range(1, conv_stages + 1)))
    wanted = {key: value for key, value in model.state_dict().items() if key.startswith(parts)}
    for key, value in wanted.items():
        if key not in state or state[key].shape != value.shape:
            found = f"has {tuple(state[key].shape)}" if key in state else "is missing"
            raise ValueError(
                f"pretrained_backbone {source!r} does not fit: {key} {found}, "
                f"this model needs {tuple(value.shape)}"
            )
    model.load_state_dict({key: state[key] for key in wanted}, strict=False)


def _read(source: str) -> tuple[State, tuple[float, ...], tuple[float, ...]]:
    """Read weights, under this project's names, and the mean and std of their training images."""
    is_file = Path(source).suffix in WEIGHT_FILES or Path(source).exists()
    if not is_file and not timm.is_model(source):
        raise ValueError(
            f"pretrained_backbone {source!r} is neither a file ({', '.join(WEIGHT_FILES[:2])}) "
            f"nor a timm model such as 'resnet50'"
        )
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    try:
        if is_file:
            state = load_state_dict(source)
        else:
            pretrained: Any = timm.create_model(source, pretrained=True)
            state = pretrained.state_dict()
            mean, std = pretrained.pretrained_cfg["mean"], pretrained.pretrained_cfg["std"]
    except UNREADABLE as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"pretrained_backbone {source!r} cannot be read: {reason}") from error
    # This project's own ResNets read images in [0, 1].
    if FIRST_CONV in state:
        return dict(state), (0.0,) * 3, (1.0,) * 3
    return {_renamed(key): value for key, value in state.items()}, tuple(mean), tuple(std)


def _renamed(key: str) -> str:
    """Rename a parameter of timm's ResNet: conv1 and bn1 are in the stem, layer1 is stage1."""
    return f"stem.{key}" if key.startswith(("conv1.", "bn1.")) else key.replace("layer", "stage", 1)


def _on_encoding(weight: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turn a convolution (O, C, k, k) on (x - mean) / std into (O, 2 C, k, k) on [x, 1 - x]."""
    mu, sigma = (
        torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std)
    )
    return torch.cat([weight * (1 - mu) / sigma, -weight * mu / sigma], dim=1).to(weight.dtype)


def _adapt_halves(weight: Tensor, in_chans: int) -> Tensor:
    """Adapt (O, 2 C, i, j) for C image channels to (O, 2 in_chans, i, j).

    Each half is adapted by timm's rule: summed for one channel, repeated for more.
    """
    halves = [
        adapt_input_conv(in_chans, half, base_chans=half.shape[1])
        for half in weight.chunk(2, dim=1)
    ]
    return torch.cat(halves, dim=1)


def adapt_checkpoint(state: State, model: Any) -> State:
    """Fit a checkpoint of the same CoDA network to other input channels and classes.

    timm calls it as its filter of pretrained weights. The classifier, which as a DAU has three
    parameters, is dropped where timm would drop a linear one, and where its shape differs. The
    first layer is exact for a convolution and grey images; a DAU's norm sees other weights, so it
    needs fine-tuning.
    """
    own = model.state_dict()
    classifier = {key for key in state if key.startswith("head.classifier.")}
    foreign = any(key not in own or own[key].shape != state[key].shape for key in classifier)
    if foreign or model.num_classes != model.pretrained_cfg["num_classes"]:
        state = {key: value for key, value in state.items() if key not in classifier}
    first_layer = next(iter(own)).rpartition(".")[0] + "."
    adapted = {}
    for key, value in state.items():
        wanted = own[key].shape if key.startswith(first_layer) and key in own else value.shape
        fits = wanted == value.shape or value.ndim < 2
        adapted[key] = value if fits else _adapt_first_layer(value, wanted, model.in_chans)
    return adapted


def _adapt_first_layer(value: Tensor, wanted: torch.Size, in_chans: int) -> Tensor:
    """Adapt a parameter of the first layer to ``in_chans`` image channels, if it can be."""
    if value.ndim == 4:
        return _adapt_halves(value, in_chans)
    if wanted[::2] != value.shape[::2]:
        return value
    # A (O, d, r) or b (O, d) of a DAU, d ordered row, column, channel.
    taps = wanted[1] // (2 * in_chans)
    channels = value.shape[1] // taps
    by_channel = value.reshape(len(value), taps, channels, -1).transpose(1, 2)  # (O, 2 C, k², r)
    return _adapt_halves(by_channel, in_chans).transpose(1, 2).reshape(wanted)
