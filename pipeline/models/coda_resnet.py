"""Hybrids: a conventional ResNet up to some depth, CoDA layers from there on; and the plain CIFAR ResNet they are compared with.

Trunk after He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), built from timm's blocks; CoDA part
after Böhle, Fritz, Schiele (arXiv 2109.13004). The output is exactly linear in the features at the junction.
"""

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, make_blocks
from torch import Tensor, nn

from pipeline.models.coda import FEATURES, LOGIT_BIAS, CoDAStagedNet, default_cfg
from pipeline.models.dau import DAUConv2d, Norm
from pipeline.models.staged import StagedNet

Block = type[BasicBlock] | type[Bottleneck]


def _stem(in_channels: int, channels: int, small_images: bool) -> tuple[nn.Sequential, int]:
    """The stem and its reduction: 3x3 for CIFAR-sized images, 7x7 with pooling otherwise."""
    kernel, stride = (3, 1) if small_images else (7, 2)
    stem = nn.Sequential()
    stem.add_module("conv1", nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2, bias=False))
    stem.add_module("bn1", nn.BatchNorm2d(channels))
    stem.add_module("act1", nn.ReLU(inplace=True))
    if not small_images:
        stem.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
    return stem, 1 if small_images else 4


def _conventional(in_channels: int, block: Block, layers: Sequence[int], channels: Sequence[int], stem_channels: int, small_images: bool):
    """Stem, residual stages and their feature_info; convolutions start as He et al. do, for rectifiers."""
    stem, reduction = _stem(in_channels, stem_channels, small_images)
    blocks, info = make_blocks((block,) * len(layers), tuple(channels), tuple(layers), stem_channels, norm_layer=nn.BatchNorm2d)
    stages = [(f"stage{index}", stage) for index, (_, stage) in enumerate(blocks, start=1)]
    for module in [stem, *(stage for _, stage in stages)]:
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    scale = 4 // reduction  # make_blocks counts from a stem that reduces by 4
    feature_info = [dict(num_chs=stem_channels, reduction=reduction, module="stem")]
    for (name, _), item in zip(stages, info, strict=True):
        feature_info.append(dict(num_chs=item["num_chs"], reduction=item["reduction"] // scale, module=name))
    return stem, stages, feature_info


class CoDAResNet(CoDAStagedNet):
    """A ResNet whose stages after ``conv_stages`` are chains of DAU convolutions, with a CoDA head.

    Every CoDA stage halves the resolution in its first 3x3 layer as the residual stage would. Where the features are wider
    than the stage, a 1x1 DAU reduces them first: a 3x3 DAU has in_channels * 9 * rank parameters per unit.

    Args:
        block, layers, channels: of the ResNet, for all stages, conventional or not.
        conv_stages: conventional stages kept, 0 (stem only) to len(layers) (only the classifier is a DAU).
        stem_channels, small_images: see ``_stem``.
        coda_layers: 3x3 DAU layers of every CoDA stage.
        coda_width: most units of a CoDA layer; fewer where the ResNet's stage is narrower.
        rank: of every DAU layer, classifier included.
        norm, temperature, logit_bias: see :class:`CoDANet`.
        num_classes, in_chans, global_pool: as timm defines them; global_pool is "sum" or "".
    """

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        channels: Sequence[int],
        conv_stages: int,
        stem_channels: int = 64,
        small_images: bool = False,
        coda_layers: int = 2,
        coda_width: int = 128,
        rank: int = 16,
        norm: Norm = "sq",
        temperature: float = 1000.0,
        logit_bias: float = LOGIT_BIAS,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "sum",
    ):
        if not 0 <= conv_stages <= len(layers):
            raise ValueError(f"conv_stages is {conv_stages}; this network has stages 0 to {len(layers)}")
        stem, stages, info = _conventional(6, block, layers[:conv_stages], channels[:conv_stages], stem_channels, small_images)
        for index in range(conv_stages, len(layers)):
            stride = 1 if index == 0 else 2
            width = min(coda_width, channels[index])
            stage = _coda_stage(info[-1]["num_chs"], width, stride, coda_layers, rank, norm)
            stages.append((f"stage{index + 1}", stage))
            info.append(dict(num_chs=width, reduction=info[-1]["reduction"] * stride, module=f"stage{index + 1}"))
        super().__init__(
            stem,
            stages,
            info,
            num_classes,
            in_chans,
            global_pool,
            head_rank=rank,
            norm=norm,
            temperature=temperature,
            logit_bias=logit_bias,
        )


def _coda_stage(in_channels: int, width: int, stride: int, layers: int, rank: int, norm: Norm) -> nn.Sequential:
    stage = nn.Sequential()
    if in_channels > width:
        stage.append(DAUConv2d(in_channels, width, 1, rank=rank, norm=norm))
        in_channels = width
    for layer in range(layers):
        stage.append(DAUConv2d(in_channels, width, 3, stride=stride if layer == 0 else 1, padding=1, rank=rank, norm=norm))
        in_channels = width
    return stage


class LinearHead(nn.Module):
    """Mean over positions and a linear layer: (B, in_channels, H, W) -> (B, num_classes)."""

    def __init__(self, in_channels: int, num_classes: int, pool: str):
        super().__init__()
        if pool not in ("avg", ""):
            raise ValueError(f"global_pool is {pool!r}; valid: 'avg', or '' for none")
        self.pool = pool
        self.classifier = nn.Linear(in_channels, num_classes) if num_classes else nn.Identity()

    def forward(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = features.mean((2, 3)) if self.pool else features
        return pooled if pre_logits else self.classifier(pooled)


class CIFARResNet(StagedNet):
    """The plain ResNet for 32x32 images (He et al., section 4.2), with projection shortcuts, on RGB in [0, 1]."""

    def __init__(
        self,
        layers: Sequence[int],
        channels: Sequence[int] = (16, 32, 64),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
    ):
        stem, stages, info = _conventional(3, BasicBlock, layers, channels, channels[0], small_images=True)
        super().__init__(stem, stages, info, num_classes, in_chans, global_pool)

    def new_head(self, num_classes: int, global_pool: str) -> nn.Module:
        return LinearHead(self.num_features, num_classes, global_pool)


_ON_IMAGENET = default_cfg(224, 32, 1000, first_conv="stem.conv1")
_ON_CIFAR = default_cfg(32, 4, 10, first_conv="stem.conv1")
_FOUR = dict(FEATURES, out_indices=(0, 1, 2, 3))  # stem and three stages
default_cfgs = generate_default_cfgs(
    {
        "resnet20.untrained": _ON_CIFAR,
        "coda_resnet20.untrained": _ON_CIFAR,
        "coda_resnet18.untrained": _ON_IMAGENET,
        "coda_resnet50.untrained": _ON_IMAGENET,
    }
)


@register_model
def resnet20(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """The plain ResNet-20 for 32x32 images."""
    return build_model_with_cfg(CIFARResNet, "resnet20", pretrained, feature_cfg=dict(_FOUR), **{"layers": (3, 3, 3), **kwargs})


@register_model
def coda_resnet20(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """ResNet-20 for 32x32 images whose last stage is three DAU layers."""
    sizes = dict(block=BasicBlock, layers=(3, 3, 3), channels=(16, 32, 64), stem_channels=16, small_images=True)
    coda = dict(conv_stages=2, coda_layers=3, coda_width=64, rank=8, temperature=640.0)
    return build_model_with_cfg(CoDAResNet, "coda_resnet20", pretrained, feature_cfg=dict(_FOUR), **{**sizes, **coda, **kwargs})


@register_model
def coda_resnet18(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """ResNet-18 whose last stage is a chain of DAU layers."""
    sizes = dict(block=BasicBlock, layers=(2, 2, 2, 2), channels=(64, 128, 256, 512), conv_stages=3)
    return build_model_with_cfg(CoDAResNet, "coda_resnet18", pretrained, feature_cfg=dict(FEATURES), **{**sizes, **kwargs})


@register_model
def coda_resnet50(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """ResNet-50 whose last stage is a chain of DAU layers."""
    sizes = dict(block=Bottleneck, layers=(3, 4, 6, 3), channels=(64, 128, 256, 512), conv_stages=3)
    return build_model_with_cfg(CoDAResNet, "coda_resnet50", pretrained, feature_cfg=dict(FEATURES), **{**sizes, **kwargs})
