"""Small models whose explanations are known, and helpers of the tests that use them."""

import torch
from torch import Tensor, nn


class DynamicConv(nn.Module):
    """Planted dynamic linear layer: y_o(p) = <w_o(x), x(p)> at each position p."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.explaining = False
        self.inner = nn.Conv2d(in_channels, in_channels * out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner(x).tanh().unflatten(1, (-1, x.shape[1]))  # (B, O, C, H, W)
        return ((weight.detach() if self.explaining else weight) * x[:, None]).sum(2)


class PlantedCoDA(nn.Module):
    """Encoding, a conventional stem, two dynamic stages, and a dynamic head outside of them."""

    def __init__(
        self, temperature: float = 7.0, logit_bias: float = -2.2, conventional: bool = False
    ):
        super().__init__()
        self.temperature, self.logit_bias = temperature, logit_bias
        self.stem = (
            nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
            if conventional
            else nn.Identity()
        )
        self.stage1 = nn.Sequential(DynamicConv(4 if conventional else 6, 5), DynamicConv(5, 4))
        self.pool = nn.AvgPool2d(2)
        self.stage2 = nn.Sequential(DynamicConv(4, 6))
        self.head = DynamicConv(6, 3)
        self.feature_info = [{"module": name} for name in ("stem", "stage1", "stage2")]

    def encode(self, images: Tensor) -> Tensor:
        return torch.cat([images, 1 - images], 1)

    def forward_encoded(self, encoded: Tensor) -> Tensor:
        features = self.stage2(self.pool(self.stage1(self.stem(encoded))))
        return self.head(features).sum((2, 3)) / self.temperature + self.logit_bias

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_encoded(self.encode(images))


class PlantedLinear(nn.Module):
    """logit_c = <w_c, x>: no encoding, no temperature, no bias."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)  # (classes, 3, H, W)

    def forward(self, images: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", images, self.weight)


class Distracted(PlantedLinear):
    """Computes something that its logits do not depend on."""

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.idle = nn.AvgPool2d(2)

    def forward(self, images: Tensor) -> Tensor:
        self.idle(images)
        return super().forward(images)


class Chain(nn.Sequential):
    """Convolutions, a shortcut, global pooling and a linear layer.

    With ``inplace``, activations and the addition of the shortcut work in place.
    """

    def __init__(self, inplace: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv1, self.act1 = nn.Conv2d(3, 4, 3), nn.ReLU(inplace)
        self.conv2, self.act2 = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace)
        self.fc = nn.Linear(4, 5)
        self.inplace = inplace
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        shortcut = self.act1(self.conv1(images))
        features = self.conv2(shortcut)
        features = features.add_(shortcut) if self.inplace else features + shortcut
        return self.fc(self.act2(features).mean((2, 3)))


class Block(nn.Module):
    """A dynamic layer followed by a convolution inside one block; its activation runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.dynamic, self.conv, self.act = DynamicConv(3, 3), nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.act(self.dynamic(x))))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flags(model: nn.Module) -> list[tuple[bool, bool | None]]:
    return [(module.training, getattr(module, "explaining", None)) for module in model.modules()]
