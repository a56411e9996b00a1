"""Conventional ResNets: the trunk that hybrids begin with, and the plain networks for CIFAR.

Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385). The trunk is
built from timm's blocks.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, make_blocks
from torch import Tensor, nn

from pipeline.models.coda_base import default_cfg
from pipeline.models.staged import StagedNet, build

Block = type[BasicBlock] | type[Bottleneck]
# Scale of a residual branch at the start. With 1, gradients grow 800-fold from head to stem of a
# ResNet-152.
RESIDUAL_SCALE = 0.25
# Channels of the ResNet-8, which spends its operations on width: large products suit a processor.
WIDE = (32, 96, 192)


def build_trunk(
    in_channels: int,
    block: Block,
    layers: Sequence[int],
    channels: Sequence[int],
    stem_channels: int,
    small_images: bool,
) -> tuple[dict[str, nn.Sequential], list[dict[str, Any]]]:
    """Build a stem and residual stages.

    The stem is 3x3 for CIFAR-sized images, 7x7 with stride 2 otherwise; the pooling after the
    latter belongs to stage1. Convolutions start as those of He et al., for rectifiers, and the last
    normalisation of a block starts small, so that gradients neither grow nor vanish with the depth.

    Args:
        in_channels: of the encoded image.
        block: of the residual stages.
        layers: blocks of each stage.
        channels: of each stage, before the expansion of a bottleneck.
        stem_channels: channels of the stem.
        small_images: whether the images are CIFAR-sized.

    Returns:
        The stages by name, the stem first, and timm's feature_info of them.
    """
    kernel, stride = (3, 1) if small_images else (7, 2)
    stem = OrderedDict(
        conv1=nn.Conv2d(
            in_channels, stem_channels, kernel, stride=stride, padding=kernel // 2, bias=False
        ),
        bn1=nn.BatchNorm2d(stem_channels),
        act1=nn.ReLU(inplace=True),
    )
    stages = {"stem": nn.Sequential(stem)}
    feature_info: list[dict[str, Any]] = [
        dict(num_chs=stem_channels, reduction=stride, module="stem")
    ]
    kept = len(layers)
    # timm divides by the number of blocks less one, so a single block gets a second stage, which is
    # left out below.
    if sum(layers) == 1:
        layers, channels = (*layers, 1), (*channels, channels[-1])
    blocks, info = make_blocks(
        (block,) * len(layers),
        tuple(channels),
        tuple(layers),
        stem_channels,
        norm_layer=nn.BatchNorm2d,
    )
    # make_blocks counts from a stem and pooling that reduce by 4.
    scale = 4 if small_images else 1
    for (_, stage), item in zip(blocks[:kept], info[:kept], strict=True):
        name = f"stage{len(stages)}"
        stages[name] = nn.Sequential(
            OrderedDict([*stem_pool(name, small_images), *stage.named_children()])
        )
        reduction = item["reduction"] // scale
        feature_info.append(dict(num_chs=item["num_chs"], reduction=reduction, module=name))
    _initialise(stages)
    return stages, feature_info


def _initialise(stages: dict[str, nn.Sequential]) -> None:
    """Draw the convolutions, and scale the residual branches."""
    for stage in stages.values():
        for part in stage.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(part, BasicBlock | Bottleneck):
                last: Any = part.bn3 if isinstance(part, Bottleneck) else part.bn2
                nn.init.constant_(last.weight, RESIDUAL_SCALE)


def stem_pool(stage: str, small_images: bool) -> list[tuple[str, nn.Module]]:
    """Build the pooling that follows a large stem, (name, module), if ``stage`` begins with it."""
    if stage == "stage1" and not small_images:
        return [("pool", nn.MaxPool2d(3, stride=2, padding=1))]
    return []


class LinearHead(nn.Module):
    """Mean over positions and a linear layer: (B, in_channels, H, W) -> (B, num_classes)."""

    def __init__(self, in_channels: int, num_classes: int, pool_type: str):
        super().__init__()
        if pool_type not in ("avg", ""):
            raise ValueError(f"global_pool is {pool_type!r}; valid: 'avg', or '' for none")
        self.pool_type = pool_type
        self.classifier = nn.Linear(in_channels, num_classes) if num_classes else nn.Identity()

    def forward(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute the logits, or with ``pre_logits`` the pooled features (B, in_channels)."""
        pooled = features.mean((2, 3)) if self.pool_type else features
        if pre_logits:
            return pooled
        logits: Tensor = self.classifier(pooled)
        return logits


class CIFARResNet(StagedNet):
    """The plain ResNet for 32x32 images (He et al., section 4.2), with projection shortcuts.

    It reads images in [0, 1].

    Args:
        layers: blocks of each stage.
        channels: of each stage.
        num_classes: as timm defines it.
        in_chans: as timm defines it.
        global_pool: "avg" or "".
    """

    def __init__(
        self,
        layers: Sequence[int],
        channels: Sequence[int] = (16, 32, 64),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
    ):
        stages, info = build_trunk(
            in_chans, BasicBlock, layers, channels, channels[0], small_images=True
        )
        super().__init__(stages, info, num_classes, in_chans, global_pool)

    def new_head(self, num_classes: int, global_pool: str) -> nn.Module:
        """Build the pooling and the linear layer; see :meth:`StagedNet.new_head`."""
        return LinearHead(self.num_features, num_classes, global_pool)


_PLAIN = default_cfg(32, 4, 10, "stem.conv1", classifier="head.classifier")
default_cfgs = generate_default_cfgs(
    {"resnet8.untrained": _PLAIN, "resnet20.untrained": _PLAIN, "resnet56.untrained": _PLAIN}
)


@register_model
def resnet8(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """Build the plain ResNet-8 for 32x32 images and short training runs.

    It has more channels than the small ones of He et al.
    """
    sizes = dict(layers=(1, 1, 1), channels=WIDE)
    return build(CIFARResNet, "resnet8", pretrained, 4, **{**sizes, **kwargs})


@register_model
def resnet20(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """Build the plain ResNet-20 for 32x32 images."""
    return build(CIFARResNet, "resnet20", pretrained, 4, **{"layers": (3, 3, 3), **kwargs})


@register_model
def resnet56(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """Build the plain ResNet-56 for 32x32 images."""
    return build(CIFARResNet, "resnet56", pretrained, 4, **{"layers": (9, 9, 9), **kwargs})
