"""Hybrids: a conventional ResNet up to some depth, CoDA layers from there on; and the plain CIFAR
ResNets they are compared with.

Trunk after He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), built from
timm's blocks; CoDA part after Böhle, Fritz, Schiele (arXiv 2109.13004). The output is exactly
linear in the features at the junction.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, make_blocks
from torch import Tensor, nn

from pipeline.models.coda_base import LOGIT_BIAS, CoDAStagedNet, build_coda, default_cfg
from pipeline.models.dau import DAUConv2d, Norm
from pipeline.models.dau.layer import require_whole
from pipeline.models.pretrained import load_backbone
from pipeline.models.staged import StagedNet, build

Block = type[BasicBlock] | type[Bottleneck]
# of a residual branch at the start: with 1, gradients grow 800-fold from head to stem of a
# ResNet-152
RESIDUAL_SCALE = 0.25


def _conventional(
    in_channels: int,
    block: Block,
    layers: Sequence[int],
    channels: Sequence[int],
    stem_channels: int,
    small_images: bool,
) -> tuple[dict[str, nn.Sequential], list[dict[str, Any]]]:
    """Stem, residual stages and their feature_info; convolutions start as He et al. do, for
    rectifiers, and the last normalisation of a block small, so that gradients neither grow nor
    vanish with the depth.

    The stem is 3x3 for CIFAR-sized images, 7x7 with stride 2 otherwise; the pooling after the
    latter belongs to stage1.
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
    # timm divides by the number of blocks less one: it builds one more stage
    if sum(layers) == 1:
        layers, channels = (*layers, 1), (*channels, channels[-1])
    blocks, info = make_blocks(
        (block,) * len(layers),
        tuple(channels),
        tuple(layers),
        stem_channels,
        norm_layer=nn.BatchNorm2d,
    )
    # make_blocks counts from a stem and pooling that reduce by 4
    scale = 4 if small_images else 1
    for (_, stage), item in zip(blocks[:kept], info[:kept], strict=True):
        name = f"stage{len(stages)}"
        stages[name] = nn.Sequential(
            OrderedDict([*_pool(name, small_images), *stage.named_children()])
        )
        feature_info.append(
            dict(num_chs=item["num_chs"], reduction=item["reduction"] // scale, module=name)
        )
    for stage in stages.values():
        for part in stage.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(part, BasicBlock | Bottleneck):
                last: Any = part.bn3 if isinstance(part, Bottleneck) else part.bn2
                nn.init.constant_(last.weight, RESIDUAL_SCALE)
    return stages, feature_info


def _pool(stage: str, small_images: bool) -> list[tuple[str, nn.Module]]:
    return (
        [("pool", nn.MaxPool2d(3, stride=2, padding=1))]
        if stage == "stage1" and not small_images
        else []
    )


class CoDAResNet(CoDAStagedNet):
    """A ResNet whose stages after ``conv_stages`` are chains of DAU convolutions, with a CoDA head.

    Every CoDA stage halves the resolution in its first 3x3 layer as the residual stage would. Where
    the features are wider than the stage, a 1x1 DAU reduces them first: a 3x3 DAU has in_channels *
    9 * rank parameters per unit.

    Args:
        block, layers, channels: of the ResNet, for all stages, conventional or not.
        conv_stages: conventional stages kept, 0 (stem only) to len(layers) (only the head is CoDA).
        stem_channels, small_images: see ``_conventional``.
        coda_layers: 3x3 DAU layers of every CoDA stage.
        coda_width, rank: units, and rank of every DAU, in the last stage and the head.
        coda_shares: for every stage, its share of coda_width and of rank; early stages have many
            positions.
        norm, temperature, logit_bias: see :class:`CoDANet`.
        pretrained_backbone: where the conventional part's weights come from, see
            :func:`load_backbone`; None draws them.
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
        stages, info = _conventional(
            2 * in_chans,
            block,
            layers[:conv_stages],
            channels[:conv_stages],
            stem_channels,
            small_images,
        )
        for index in range(conv_stages, len(layers)):
            name, before = f"stage{index + 1}", info[-1]
            width, stage_rank = (
                max(1, round(size * coda_shares[index])) for size in (coda_width, rank)
            )
            stride = 1 if index == 0 else 2
            chain = _coda_chain(before["num_chs"], width, stride, coda_layers, stage_rank, norm)
            pool = _pool(name, small_images)
            numbered = [(str(position), layer) for position, layer in enumerate(chain)]
            stages[name] = nn.Sequential(OrderedDict([*pool, *numbered]))
            info.append(
                dict(
                    num_chs=width,
                    reduction=before["reduction"] * stride * (2 if pool else 1),
                    module=name,
                )
            )
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
) -> list[DAUConv2d]:
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
    return chain


class LinearHead(nn.Module):
    """Mean over positions and a linear layer: (B, in_channels, H, W) -> (B, num_classes)."""

    def __init__(self, in_channels: int, num_classes: int, pool_type: str):
        super().__init__()
        if pool_type not in ("avg", ""):
            raise ValueError(f"global_pool is {pool_type!r}; valid: 'avg', or '' for none")
        self.pool_type = pool_type
        self.classifier = nn.Linear(in_channels, num_classes) if num_classes else nn.Identity()

    def forward(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = features.mean((2, 3)) if self.pool_type else features
        return pooled if pre_logits else self.classifier(pooled)


class CIFARResNet(StagedNet):
    """The plain ResNet for 32x32 images (He et al., section 4.2), with projection shortcuts, on
    images in [0, 1].
    """

    def __init__(
        self,
        layers: Sequence[int],
        channels: Sequence[int] = (16, 32, 64),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
    ):
        stages, info = _conventional(
            in_chans, BasicBlock, layers, channels, channels[0], small_images=True
        )
        super().__init__(stages, info, num_classes, in_chans, global_pool)

    def new_head(self, num_classes: int, global_pool: str) -> nn.Module:
        return LinearHead(self.num_features, num_classes, global_pool)


_ON_IMAGENET = default_cfg(224, 32, 1000, "stem.conv1")
_ON_CIFAR = default_cfg(32, 4, 10, "stem.conv1")
_PLAIN = default_cfg(32, 4, 10, "stem.conv1", classifier="head.classifier")
default_cfgs = generate_default_cfgs(
    {
        "resnet8.untrained": _PLAIN,
        "resnet20.untrained": _PLAIN,
        "resnet56.untrained": _PLAIN,
        "coda_resnet8.untrained": _ON_CIFAR,
        "coda_resnet20.untrained": _ON_CIFAR,
        "coda_resnet56.untrained": _ON_CIFAR,
        **{f"coda_resnet{depth}.untrained": _ON_IMAGENET for depth in (18, 34, 50, 101, 152)},
    }
)


# channels of the ResNet-8, which spends its operations on width: large products suit a processor
WIDE = (32, 96, 192)


@register_model
def resnet8(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """The plain ResNet-8 for 32x32 images, with more channels than He et al. give small ones, for
    short trainings.
    """
    return build(
        CIFARResNet, "resnet8", pretrained, 4, **{"layers": (1, 1, 1), "channels": WIDE, **kwargs}
    )


@register_model
def resnet20(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """The plain ResNet-20 for 32x32 images."""
    return build(CIFARResNet, "resnet20", pretrained, 4, **{"layers": (3, 3, 3), **kwargs})


@register_model
def resnet56(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """The plain ResNet-56 for 32x32 images."""
    return build(CIFARResNet, "resnet56", pretrained, 4, **{"layers": (9, 9, 9), **kwargs})


@register_model
def coda_resnet8(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """The wide ResNet-8 for 32x32 images whose last stage is two DAU layers of 64 units and rank 8,
    behind a 1x1 DAU.
    """
    trunk = dict(channels=WIDE, stem_channels=WIDE[0], coda_layers=2, coda_width=64)
    return _small_hybrid("coda_resnet8", pretrained, (1, 1, 1), {**trunk, **kwargs})


def _small_hybrid(
    name: str, pretrained: bool, layers: tuple[int, ...], options: dict[str, Any]
) -> CoDAResNet:
    """For 32x32 images: the last of three stages is three DAU layers of 32 units and rank 8."""
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
    """For ImageNet: the last of four stages is two 3x3 DAU layers of 128 units and rank 16, behind
    a 1x1 DAU that reduces to as many.
    """
    trunk = dict(block=block, layers=layers, channels=(64, 128, 256, 512), conv_stages=3)
    return build_coda(CoDAResNet, name, pretrained, 5, trunk, options)


@register_model
def coda_resnet20(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """ResNet-20 for 32x32 images whose last stage is a chain of DAU layers."""
    return _small_hybrid("coda_resnet20", pretrained, (3, 3, 3), kwargs)


@register_model
def coda_resnet56(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """ResNet-56 for 32x32 images whose last stage is a chain of DAU layers."""
    return _small_hybrid("coda_resnet56", pretrained, (9, 9, 9), kwargs)


@register_model
def coda_resnet18(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """ResNet-18 whose last stage is a chain of DAU layers."""
    return _hybrid("coda_resnet18", pretrained, BasicBlock, (2, 2, 2, 2), kwargs)


@register_model
def coda_resnet34(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """ResNet-34 whose last stage is a chain of DAU layers."""
    return _hybrid("coda_resnet34", pretrained, BasicBlock, (3, 4, 6, 3), kwargs)


@register_model
def coda_resnet50(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """ResNet-50 whose last stage is a chain of DAU layers."""
    return _hybrid("coda_resnet50", pretrained, Bottleneck, (3, 4, 6, 3), kwargs)


@register_model
def coda_resnet101(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """ResNet-101 whose last stage is a chain of DAU layers."""
    return _hybrid("coda_resnet101", pretrained, Bottleneck, (3, 4, 23, 3), kwargs)


@register_model
def coda_resnet152(pretrained: bool = False, **kwargs: Any) -> CoDAResNet:
    """ResNet-152 whose last stage is a chain of DAU layers."""
    return _hybrid("coda_resnet152", pretrained, Bottleneck, (3, 8, 36, 3), kwargs)
