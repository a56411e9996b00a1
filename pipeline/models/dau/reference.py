"""A slow, obviously right twin of DAUConv2d, which forms every dynamic weight.

It reads as the published formula does (Böhle, Fritz, Schiele, arXiv 2109.13004, section 3).
"""

import torch
from torch import Tensor
from torch.nn.functional import unfold

from pipeline.models.dau import DAUConv2d
from pipeline.models.dau.layer import NORM2_FLOOR


def twin(layer: DAUConv2d, x: Tensor) -> Tensor:
    """Compute the output of ``layer`` on ``x`` (B, C, H, W).

    All w_o = A_o z + b_o, of all positions and units, are held at once. L is the number of
    positions of an image.
    """
    k, s, p = layer.kernel_size, layer.stride, layer.padding
    patches = unfold(x, k, stride=s, padding=p)  # (B, d, L), d ordered channel, row, column
    # Ordered as in the layer: row, column, channel.
    patches = torch.unflatten(patches, 1, (-1, k * k)).transpose(1, 2).flatten(1, 2)
    z = torch.einsum("rd,bdl->brl", layer.down.weight.permute(0, 2, 3, 1).flatten(1), patches)
    w = torch.einsum("odr,brl->bodl", layer.up_weight, z)
    if layer.up_bias is not None:
        w = w + layer.up_bias[None, :, :, None]
    if layer.explaining:
        w = w.detach()
    dot = (w * patches[:, None]).sum(2)  # (B, O, L)
    if layer.norm == "wb":
        norm2_a = layer.up_weight.square().sum((1, 2))  # (O,)
        norm2 = norm2_a[None, :, None] * z.square().sum(1, keepdim=True)  # (B, O, L)
        norm2 = norm2.detach() if layer.explaining else norm2
    else:
        norm2 = w.square().sum(2)
    norm = norm2.clamp_min(NORM2_FLOOR).sqrt()
    y: Tensor = dot * norm / (1 + norm**2) if layer.norm == "sq" else dot / norm
    height, width = ((size + 2 * p - k) // s + 1 for size in x.shape[2:])
    return y.view(len(x), -1, height, width)
