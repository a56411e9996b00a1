"""Hybrids: a conventional ResNet up to some depth, CoDA layers from there on.

Trunk after He et al. (arXiv 1512.03385), CoDA part after Böhle, Fritz, Schiele (arXiv 2109.13004).
The output is exactly linear in the features at the junction.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from pipeline.models.coda_base import LOGIT_BIAS, CoDAStagedNet, build_coda, default_cfg
from pipeline.models.dau import DAUConv2d, Norm
from pipeline.models.dau.layer import require_whole
from pipeline.models.plain_resnet import WIDE, Block, build_trunk, stem_pool
from pipeline.models.pretrained import load_backbone


class CoDAResNet(CoDAStagedNet):
    """A ResNet whose stages after ``conv_stages`` are chains of DAU convolutions, with a CoDA head.

    Every CoDA stage halves the resolution in its first 3x3 layer as the residual stage would. Where
    the features are wider than the stage, a 1x1 DAU reduces them first: a 3x3 DAU has
    in_channels * 9 * rank parameters per unit.

    Args:
        block: of the ResNet.
        layers: blocks of every stage of the ResNet, conventional or not.
        channels: of every stage of the ResNet, conventional or not.
        conv_stages: conventional stages kept, 0 (stem only) to len(layers) (only the head is CoDA).
        stem_channels: channels of the stem.
        small_images: whether the images are CIFAR-sized; see ``build_trunk``.
        coda_layers: 3x3 DAU layers of every CoDA stage.
        coda_width: units of every DAU in the last stage and the head.
        rank: of every DAU in the last stage and the head.
        coda_shares: for every stage, its share of coda_width and of rank; early stages have many
            positions.
        norm: rescaling of the dynamic weights, see :class:`DAUConv2d`.
        temperature: T of :class:`CoDAHead`.
        logit_bias: b0 of :class:`CoDAHead`.
        pretrained_backbone: where the conventional part's weights come from, see
            :func:`load_backbone`; None draws them.
        num_classes: as timm defines it.
        in_chans: as timm defines it.
        global_pool: "sum" or "".
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
        coda_shares: Sequence[float] = (0.25, 0.5, 1.0, 1.0),
        norm: Norm = "sq",
        temperature: float = 1000.0,
        logit_bias: float = LOGIT_BIAS,
        pretrained_backbone: str | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "sum",
    ):
        require_whole(rank=rank, coda_width=coda_width, coda_layers=coda_layers)
        if type(conv_stages) is not int or not 0 <= conv_stages <= len(layers):
            raise ValueError(
                f"conv_stages is {conv_stages!r}; this network has stages 0 to {len(layers)}"
            )
        stages, info = build_trunk(
            2 * in_chans,
            block,
            layers[:conv_stages],
            channels[:conv_stages],
            stem_channels,
            small_images,
        )
        for index in range(conv_stages, len(layers)):
            name, before = f"stage{index + 1}", info[-1]
            width = max(1, round(coda_width * coda_shares[index]))
            stage_rank = max(1, round(rank * coda_shares[index]))
            stride = 1 if index == 0 else 2
            chain = _coda_chain(before["num_chs"], width, stride, coda_layers, stage_rank, norm)
            pool = stem_pool(name, small_images)
            stages[name] = nn.Sequential(OrderedDict([*pool, *chain]))
            reduction = before["reduction"] * stride * (2 if pool else 1)
            info.append(dict(num_chs=width, reduction=reduction, module=name))
        super().__init__(
            stages,
            info,
            num_classes,
            in_chans,
            global_pool,
            head_rank=rank,
            head_width=coda_width,
            norm=norm,
            temperature=temperature,
            logit_bias=logit_bias,
        )
        self.conv_stages = conv_stages
        if pretrained_backbone is not None:
            load_backbone(self, pretrained_backbone, conv_stages)


def _coda_chain(
    in_channels: int, width: int, stride: int, layers: int, rank: int, norm: Norm
) -> list[tuple[str, DAUConv2d]]:
    """Build the numbered layers of one CoDA stage; the first 3x3 layer has the stride."""
    chain = []
    if in_channels > width:
        chain.append(DAUConv2d(in_channels, width, 1, rank=rank, norm=norm))
        in_channels = width
    for layer in range(layers):
        chain.append(
            DAUConv2d(
                in_channels,
                width,
                3,
                stride=stride if layer == 0 else 1,
                padding=1,
                rank=rank,
                norm=norm,
            )
        )
        in_channels = width
    return [(str(position), layer) for position, layer in enumerate(chain)]


_ON_IMAGENET = default_cfg(224, 32, 1000, "stem.conv1")
_ON_CIFAR = default_cfg(32, 4, 10, "stem.conv1")
default_cfgs = generate_default_cfgs(
    {
        **{f"coda_resnet{depth}.untrained": _ON_CIFAR for depth in (8, 20, 56)},
        **{f"coda_resnet{depth}.untrained": _ON_IMAGENET for depth in (18, 34, 50, 101, 152)},
    }
)


@register_model
def coda_resnet8(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """Build the wide ResNet-8 for 32x32 images whose last stage is CoDA.

    The stage is two 3x3 DAU layers of 64 units and rank 8 behind a 1x1 DAU.
    """
    trunk = dict(channels=WIDE, stem_channels=WIDE[0], coda_layers=2, coda_width=64)
    return _small_hybrid("coda_resnet8", pretrained, (1, 1, 1), {**trunk, **kwargs})


def _small_hybrid(
    name: str, pretrained: bool, layers: tuple[int, ...], options: dict[str, Any]
) -> CoDAResNet:
    """Build a hybrid for 32x32 images.

    The last of three stages is three DAU layers of 32 units and rank 8.
    """
    trunk = dict(
        block=BasicBlock,
        layers=layers,
        channels=(16, 32, 64),
        stem_channels=16,
        small_images=True,
        conv_stages=2,
    )
    coda = dict(
        coda_layers=3, coda_width=32, rank=8, coda_shares=(0.5, 0.5, 1.0), temperature=640.0
    )
    return build_coda(CoDAResNet, name, pretrained, 4, {**trunk, **coda}, options)


def _hybrid(
    name: str, pretrained: bool, block: Block, layers: tuple[int, ...], options: dict[str, Any]
) -> CoDAResNet:
    """Build a hybrid for ImageNet.

    The last of four stages is two 3x3 DAU layers of 128 units and rank 16, behind a 1x1 DAU that
    reduces to as many.
    """
    trunk = dict(block=block, layers=layers, channels=(64, 128, 256, 512), conv_stages=3)
    return build_coda(CoDAResNet, name, pretrained, 5, trunk, options)


@register_model
def coda_resnet20(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """Build the ResNet-20 for 32x32 images whose last stage is a chain of DAU layers."""
    return _small_hybrid("coda_resnet20", pretrained, (3, 3, 3), kwargs)


@register_model
def coda_resnet56(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """Build the ResNet-56 for 32x32 images whose last stage is a chain of DAU layers."""
    return _small_hybrid("coda_resnet56", pretrained, (9, 9, 9), kwargs)


@register_model
def coda_resnet18(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """Build the ResNet-18 whose last stage is a chain of DAU layers."""
    return _hybrid("coda_resnet18", pretrained, BasicBlock, (2, 2, 2, 2), kwargs)


@register_model
def coda_resnet34(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """Build the ResNet-34 whose last stage is a chain of DAU layers."""
    return _hybrid("coda_resnet34", pretrained, BasicBlock, (3, 4, 6, 3), kwargs)


@register_model
def coda_resnet50(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """Build the ResNet-50 whose last stage is a chain of DAU layers."""
    return _hybrid("coda_resnet50", pretrained, Bottleneck, (3, 4, 6, 3), kwargs)


@register_model
def coda_resnet101(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """Build the ResNet-101 whose last stage is a chain of DAU layers."""
    return _hybrid("coda_resnet101", pretrained, Bottleneck, (3, 4, 23, 3), kwargs)


@register_model
def coda_resnet152(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """Build the ResNet-152 whose last stage is a chain of DAU layers."""
    return _hybrid("coda_resnet152", pretrained, Bottleneck, (3, 8, 36, 3), kwargs)
