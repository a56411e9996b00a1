"""The Dynamic Alignment Unit as a convolution.

Source: Böhle, Fritz, Schiele, arXiv 2109.13004, section 3.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pipeline.models.dau.functional import Geometry, dynamic_dot, quotient

Norm = Literal["sq", "l2", "wb"]
# A weight with a smaller squared norm counts as zero: its rescaling is constant there, so that
# gradients stay finite.
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

    >>> layer = DAUConv2d(6, 16, kernel_size=3, padding=1, rank=4)
    >>> x = torch.rand(2, 6, 32, 32, requires_grad=True)
    >>> y = layer(x)
    >>> y.shape
    torch.Size([2, 16, 32, 32])
    >>> layer.explaining = True  # Hold the dynamic weights fixed in the backward pass.
    >>> y.sum().backward()
    >>> torch.allclose((x * x.grad).sum(), y.sum(), rtol=1e-3)  # The map is linear: exact.
    True

    Shape: (B, in_channels, H, W) -> (B, out_channels, H', W') with H', W' as in ``nn.Conv2d``.
    The layer computes and answers in the parameters' precision even under autocast, the norm at
    least in fp32; only on CUDA, bf16 autocast makes bf16 the operands of the large products. It is
    differentiable once, but see ``explaining``.

    Parameters: ``down.weight`` is B (rank, in_channels, k, k); ``up_weight`` is A (out_channels,
    k * k * in_channels, rank); ``up_bias`` is b (out_channels, k * k * in_channels) or None. Values
    of a patch are ordered row, column, channel.

    Attribute ``explaining``: while it is True, the dynamic weights are constants of a backward pass
    (explanation mode), so that the layer is exactly linear in its input and input x gradient gives
    exact contributions. That gradient, sum_o a_o w_o, may itself be differentiated once more, by a
    pass with ``explaining`` False: a loss can be put on it.

    Args:
        in_channels: of the input.
        out_channels: number of units.
        kernel_size: height and width of a patch.
        stride: distance between neighbouring patches.
        padding: width of the border of zeros around the input.
        rank: of the matrices A_o B, whole and at least 1.
        norm: which g.
        bias: whether there is a b.
    """

    up_weight: nn.Parameter
    up_bias: nn.Parameter | None

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
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.rank = rank
        self.norm = norm
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
        """Draw A, B and b as ``nn.Conv2d`` would in the official two-convolution form.

        They are uniform in +- 1/sqrt(fan in).
        """
        self.down.reset_parameters()
        for parameter in (self.up_weight, self.up_bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -1 / math.sqrt(self.rank), 1 / math.sqrt(self.rank))

    def forward(self, x: Tensor) -> Tensor:
        """Compute y (B, out_channels, H', W') of ``x`` (B, in_channels, H, W)."""
        device = "cpu" if x.device.type == "meta" else x.device.type
        own = self.up_weight.dtype
        exact = torch.promote_types(own, torch.float32)
        # bf16 operands of the large products; a CPU gains nothing from them.
        fast = (
            device == "cuda"
            and torch.is_autocast_enabled(device)
            and torch.get_autocast_dtype(device) == torch.bfloat16
        )
        operands = torch.bfloat16 if fast else exact
        with torch.autocast(device, enabled=False):
            x = x.to(own)
            z_map = self.down(x)  # (B, r, H', W')
            z = z_map.permute(0, 2, 3, 1).reshape(-1, self.rank)  # (N, r)
            weight: Tensor = self.up_weight
            bias: Tensor | None = self.up_bias
            dot, norm2 = dynamic_dot(
                x.to(operands),
                z.to(operands),
                weight.to(operands),
                None if bias is None else bias.to(operands),
                Geometry(self.kernel_size, self.stride, self.padding),
                self.norm != "wb",
                self,
            )
            if norm2 is None:
                norm2_z = z.to(exact).square().sum(1, keepdim=True)  # (N, 1)
                norm2_a = weight.to(exact).square().sum((1, 2))  # (O,)
                norm2 = norm2_z * norm2_a
            norm = norm2.clamp_min(NORM2_FLOOR).sqrt()
            y: Tensor = quotient(dot, norm + 1 / norm if self.norm == "sq" else norm, self)
            # (N, O) -> (B, O, H', W')
            return y.to(own).view(len(x), *z_map.shape[2:], -1).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """Describe the layer as ``nn.Conv2d`` describes itself."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, rank={self.rank}, "
            f"norm={self.norm}, bias={self.up_bias is not None}"
        )
