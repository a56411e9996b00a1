"""The Dynamic Alignment Unit as a convolution (Böhle, Fritz, Schiele, arXiv 2109.13004, section 3)."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pipeline.models.dau.functional import Geometry, dynamic_dot, quotient

Norm = Literal["sq", "l2", "wb"]
# below it a weight counts as zero: its rescaling is constant there, so that gradients stay finite
NORM2_FLOOR = 1e-12


def require_whole(**sizes: object) -> None:
    """Raise ValueError if one of ``sizes`` is not a whole number of at least 1."""
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} is {size!r}; it must be a whole number of at least 1")


class DAUConv2d(nn.Module):
    """Convolution whose weights are computed from each patch, y_o = g(A_o B x + b_o)^T x.

    g keeps the direction of the dynamic weight w and bounds its norm, so that |y_o| <= |x| for any
    parameters:

    * ``"l2"``: norm 1, y = <w, x> / |w|;
    * ``"sq"``: squashing, norm |w|^2 / (1 + |w|^2), y = <w, x> |w| / (1 + |w|^2);
    * ``"wb"``: the bound |A_o z| <= |A_o|_F |z| instead of the norm, y = <w, x> / (|A_o|_F |z|);
        has no bias b.

    Shape: (B, in_channels, H, W) -> (B, out_channels, H', W') with H', W' as in ``nn.Conv2d``.
        Computes and answers in the
    parameters' precision even under autocast, the norm at least in fp32; only on CUDA, bf16
    autocast makes bf16 the operands of the large products. Differentiable once, but see
    ``explaining``.

    Parameters ``down.weight`` is B (rank, in_channels, k, k); ``up_weight`` is A (out_channels, k *
    k * in_channels, rank); ``up_bias`` is b (out_channels, k * k * in_channels) or None. Values of
    a patch are ordered row, column, channel.

    Attribute ``explaining``: while True, the dynamic weights are constants of a backward pass
    (explanation mode), so that the layer is exactly linear in its input and input x gradient gives
    exact contributions. That gradient, sum_o a_o w_o, may itself be differentiated once more, by a
    pass with ``explaining`` False: a loss can be put on it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        rank: int,
        norm: Norm = "sq",
        bias: bool = True,
    ):
        super().__init__()
        if norm not in get_args(Norm):
            raise ValueError(f"norm is {norm!r}; valid: {', '.join(get_args(Norm))}")
        require_whole(rank=rank)
        fan_in = in_channels * kernel_size**2
        self.in_channels, self.out_channels, self.kernel_size = (
            in_channels,
            out_channels,
            kernel_size,
        )
        self.stride, self.padding, self.rank, self.norm = stride, padding, rank, norm
        self.explaining = False
        self.down = nn.Conv2d(
            in_channels, rank, kernel_size, stride=stride, padding=padding, bias=False
        )
        self.up_weight = nn.Parameter(torch.empty(out_channels, fan_in, rank))
        self.up_bias = (
            nn.Parameter(torch.empty(out_channels, fan_in)) if bias and norm != "wb" else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A, B and b as ``nn.Conv2d`` would in the official two-convolution form: uniform in
        +- 1/sqrt(fan in).
        """
        self.down.reset_parameters()
        for parameter in (self.up_weight, self.up_bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -1 / math.sqrt(self.rank), 1 / math.sqrt(self.rank))

    def forward(self, x: Tensor) -> Tensor:
        device = "cpu" if x.device.type == "meta" else x.device.type
        own, exact = self.up_weight.dtype, torch.promote_types(self.up_weight.dtype, torch.float32)
        fast = (
            device == "cuda"
            and torch.is_autocast_enabled(device)
            and torch.get_autocast_dtype(device) == torch.bfloat16
        )
        # of the large products; a CPU gains nothing from bf16
        operands = torch.bfloat16 if fast else exact
        with torch.autocast(device, enabled=False):
            x = x.to(own)
            z_map = self.down(x)  # (B, r, H', W')
            z = z_map.permute(0, 2, 3, 1).reshape(-1, self.rank)  # (N, r)
            weight: Tensor = self.up_weight
            bias: Tensor | None = self.up_bias
            geometry = Geometry(self.kernel_size, self.stride, self.padding)
            bias_operand = None if bias is None else bias.to(operands)
            dot, norm2 = dynamic_dot(
                x.to(operands),
                z.to(operands),
                weight.to(operands),
                bias_operand,
                geometry,
                self.norm != "wb",
                self,
            )
            if norm2 is None:
                # (N, 1) * (O,)
                norm2 = z.to(exact).square().sum(1, keepdim=True) * weight.to(exact).square().sum(
                    (1, 2)
                )
            norm = norm2.clamp_min(NORM2_FLOOR).sqrt()
            y = quotient(dot, norm + 1 / norm if self.norm == "sq" else norm, self)
            # (N, O) -> (B, O, H', W')
            return y.to(own).view(len(x), *z_map.shape[2:], -1).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, rank={self.rank}, norm={self.norm}, bias={self.up_bias is not None}"
        )
