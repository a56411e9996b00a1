"""Alignment: the cosine between dynamic weights and inputs of DAU layers, for units and positions.

Source: Böhle, Fritz, Schiele, arXiv 2109.13004: a unit gets a large output only by aligning w with
x, and training is meant to bring that about. The cosine is dot / (|w| |x|) from the layer's own
kernels, so the dynamic weights themselves are never held.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from pipeline.interpret.network import explanation_mode
from pipeline.models.dau import DAUConv2d
from pipeline.models.dau.functional import Geometry, dynamic_dot
from pipeline.models.dau.layer import NORM2_FLOOR

# Bins of a histogram over [-1, 1], which gives quartiles to 0.001.
BINS = 2000
QUARTILES = (0.25, 0.5, 0.75)


def cosines(layer: DAUConv2d, x: Tensor) -> Tensor:
    """Compute cos(w_o, x) of every unit at every position of a layer's input.

    Args:
        layer: of O units.
        x: input (B, C, H, W) with N positions.

    Returns:
        (N, O); NaN where w or the patch is 0.
    """
    geometry = Geometry(layer.kernel_size, layer.stride, layer.padding)
    z = layer.down(x).permute(0, 2, 3, 1).reshape(-1, layer.rank)  # (B, r, H', W') -> (N, r)
    dot, norm2 = dynamic_dot(x, z, layer.up_weight, layer.up_bias, geometry, True, layer)
    window = x.new_ones(1, 1, layer.kernel_size, layer.kernel_size)
    energy = x.square().sum(1, keepdim=True)  # (B, 1, H, W)
    # |patch|^2 as (B, 1, H', W')
    size2 = conv2d(energy, window, stride=layer.stride, padding=layer.padding)
    product = norm2 * size2.reshape(-1, 1)
    return torch.where(product > NORM2_FLOOR**2, (dot / product.sqrt()).clamp(-1, 1), torch.nan)


@torch.no_grad()
def alignment_histograms(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Count cos(w, x) over [-1, 1] for each DAU layer.

    Histograms of several batches or processes add up.

    Args:
        model: any classifier.
        images: (B, 3, H, W), RGB in [0, 1].

    Returns:
        Histograms (BINS,) in float64 by the layer's name, from the output back to the input; empty
        for a model without DAU layers.
    """
    histograms: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, DAUConv2d)
            values = cosines(layer, inputs[0].to(layer.up_weight.dtype))
            counts = torch.histc(values[values.isfinite()].float(), BINS, -1, 1)
            histograms[name] = histograms.get(name, 0) + counts.double()

        return hook

    with ExitStack() as hooks, explanation_mode(model):
        for name, module in model.named_modules():
            if isinstance(module, DAUConv2d):
                hooks.enter_context(module.register_forward_pre_hook(record(name)))
        model(images)
    return dict(reversed(histograms.items()))


def distribution(histogram: Tensor) -> dict[str, float]:
    """Compute ``mean``, ``q25``, ``median`` and ``q75`` of a histogram (bins,) over [-1, 1].

    They are exact to 2 / bins, and NaN for an empty histogram.
    """
    width = 2 / len(histogram)
    centres = -1 + width * (
        torch.arange(len(histogram), dtype=torch.float64, device=histogram.device) + 0.5
    )
    total = histogram.sum()
    if total == 0:
        return dict.fromkeys(("mean", "q25", "median", "q75"), float("nan"))
    cumulated = histogram.cumsum(0)
    places = [int((cumulated < share * total).sum()) for share in QUARTILES]
    q25, median, q75 = (centres[place].item() for place in places)
    mean = ((histogram * centres).sum() / total).item()
    return {"mean": mean, "q25": q25, "median": median, "q75": q75}
