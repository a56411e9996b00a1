"""A slow, obviously right twin of DAUConv2d: forms every dynamic weight, as the published formula
reads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.dau import DAUConv2d
from pipeline.models.dau.layer import NORM2_FLOOR


def twin(layer: DAUConv2d, x: Tensor) -> Tensor:
    """Output of ``layer`` on ``x`` (B, C, H, W) from w_o = A_o z + b_o held for all positions and
    units at once.
    """
    k, s, p = layer.kernel_size, layer.stride, layer.padding
    # (B, d, L), d ordered channel, row, column
    patches = F.unfold(x, k, stride=s, padding=p)
    # as the layer orders it: row, column, channel
    patches = patches.unflatten(1, (-1, k * k)).transpose(1, 2).flatten(1, 2)
    z = torch.einsum("rd,bdl->brl", layer.down.weight.permute(0, 2, 3, 1).flatten(1), patches)
    w = torch.einsum("odr,brl->bodl", layer.up_weight, z)
    if layer.up_bias is not None:
        w = w + layer.up_bias[None, :, :, None]
    if layer.explaining:
        w = w.detach()
    dot = (w * patches[:, None]).sum(2)  # (B, O, L)
    if layer.norm == "wb":
        norm2 = layer.up_weight.square().sum((1, 2))[None, :, None] * z.square().sum(
            1, keepdim=True
        )
        norm2 = norm2.detach() if layer.explaining else norm2
    else:
        norm2 = w.square().sum(2)
    norm = norm2.clamp_min(NORM2_FLOOR).sqrt()
    y = dot * norm / (1 + norm**2) if layer.norm == "sq" else dot / norm
    height, width = ((size + 2 * p - k) // s + 1 for size in x.shape[2:])
    return y.view(len(x), -1, height, width)
