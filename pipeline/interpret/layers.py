"""The layers of a model that contributions can explain, and their distances from its output."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.interpret.network import explanation_mode, is_dynamic, parts


@dataclass(frozen=True)
class Layer:
    """A place to explain: the output of a module, or the input encoding."""

    name: str | None
    """Name of the module, None for the input encoding."""
    distance: float
    """Share in [0, 1] of the model's parametric layers that run after it."""


def explainable_layers(model: nn.Module, example_images: Tensor) -> list[Layer]:
    """List the layers that a depth curve visits, from the output back to the input encoding.

    Candidates are the stem and stages that ``model.feature_info`` names, where a stage that is an
    ``nn.Sequential`` is replaced by its children (its blocks), and every outermost dynamic module
    (DAU convolution) outside of them. A candidate is listed if it runs once and its output is
    (B, C, H, W). Of several at one distance (a convolution, its normalisation and its activation)
    the last to run is listed, at distance 1 the encoding, which comes last.

    Parametric layers are convolutions, linear layers and dynamic modules, each dynamic module as
    one whatever it consists of, in the order in which a forward pass finishes them. A layer's own
    parameters lie before its output, so the output of the last one has distance 0.

    Args:
        model: any classifier.
        example_images: (B, 3, H, W), for one forward pass.
    """
    modules = dict(model.named_modules())
    dynamic = _outermost(name for name, module in modules.items() if is_dynamic(module))
    candidates = _blocks(model)
    candidates |= {name for name in dynamic if not _within(name, candidates)}
    parametric = dynamic | {
        name
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d | nn.Linear) and not _within(name, dynamic)
    }
    # (name, whether the output is a map), in the order in which the modules finish.
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
    # By the number of parametric layers that run later.
    layers: dict[int, Layer] = {}
    later = 0
    for name, gives_map in reversed(runs):
        if name in candidates and gives_map and times[name] == 1 and later < total:
            layers.setdefault(later, Layer(name, later / total))
        later += name in parametric
    return [*layers.values(), Layer(None, 1.0)]


def exact_layers(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Select the layers at which contributions are complete: the CoDA part and its junction.

    They reach from the output back to the junction, the input of the deepest dynamic module. In a
    model without dynamic modules only the last features count, which a pooling and a linear layer
    usually follow.

    Args:
        model: any classifier.
        layers: from ``explainable_layers``.
    """
    modules = dict(model.named_modules())
    dynamic = [
        layer.name is not None and any(map(is_dynamic, modules[layer.name].modules()))
        for layer in layers
    ]
    deepest = max((index for index, is_dynamic in enumerate(dynamic) if is_dynamic), default=-1)
    return list(layers[: deepest + 2])


def _blocks(model: nn.Module) -> set[str]:
    """Names of the stem and of the blocks of the stages in timm's ``feature_info``, if any."""
    names = set()
    for entry in getattr(model, "feature_info", ()):
        stage = model.get_submodule(entry["module"])
        inner = []
        if isinstance(stage, nn.Sequential):
            inner = [f"{entry['module']}.{name}" for name, _ in stage.named_children()]
        names |= set(inner) or {entry["module"]}
    return names


def _within(name: str, others: set[str]) -> bool:
    """Whether the module of this name is one of the others or lies inside one."""
    return any(name == other or name.startswith(f"{other}.") for other in others)


def _outermost(names: Iterator[str]) -> set[str]:
    """Keep the names that lie inside no other; parents come first, as in ``named_modules``."""
    kept: set[str] = set()
    for name in names:
        if not _within(name, kept):
            kept.add(name)
    return kept
