"""Alignment: how well the dynamic weights of DAU layers align with their inputs, cos(w, x) for
every unit and position.

Source: Böhle, Fritz, Schiele, arXiv 2109.13004: a unit gets a large output only by aligning w with
    x, and training is meant to
bring that about. The cosine is dot / (|w| |x|) of the layer's own kernels; the dynamic weights
themselves are never held.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.interpret.contributions import explanation_mode
from pipeline.models.dau import DAUConv2d
from pipeline.models.dau.functional import Geometry, dynamic_dot
from pipeline.models.dau.layer import NORM2_FLOOR

# of the histogram over [-1, 1]: quartiles to 0.001
BINS = 2000
QUARTILES = (0.25, 0.5, 0.75)


def cosines(layer: DAUConv2d, x: Tensor) -> Tensor:
    """cos(w_o, x) of every unit at every position of the input ``x`` (B, C, H, W): (N, O); NaN
    where w or the patch is 0.
    """
    geometry = Geometry(layer.kernel_size, layer.stride, layer.padding)
    z = layer.down(x).permute(0, 2, 3, 1).reshape(-1, layer.rank)  # (B, r, H', W') -> (N, r)
    dot, norm2 = dynamic_dot(x, z, layer.up_weight, layer.up_bias, geometry, True, layer)
    window = x.new_ones(1, 1, layer.kernel_size, layer.kernel_size)
    # |patch|^2
    size2 = F.conv2d(
        x.square().sum(1, keepdim=True), window, stride=layer.stride, padding=layer.padding
    )
    product = norm2 * size2.reshape(-1, 1)
    return torch.where(product > NORM2_FLOOR**2, (dot / product.sqrt()).clamp(-1, 1), torch.nan)


@torch.no_grad()
def alignment_histograms(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Histogram (BINS,) in float64 over [-1, 1] of cos(w, x) for each DAU layer by name, from the
    output back to the input.

    Histograms of several batches or processes add up. Empty for a model without DAU layers.

    Args:
        images: (B, 3, H, W), RGB in [0, 1].
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
    """``mean``, ``q25``, ``median`` and ``q75`` of a histogram over [-1, 1], (bins,); exact to 2 /
    bins. NaN for an empty one.
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
    quartiles = dict(
        zip(("q25", "median", "q75"), (centres[place].item() for place in places), strict=True)
    )
    return {"mean": ((histogram * centres).sum() / total).item(), **quartiles}
