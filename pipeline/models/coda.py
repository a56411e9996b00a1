"""Pure CoDA networks: S and L as in the official code, XS, M and XL of this project.

Source: Böhle, Fritz, Schiele, arXiv 2109.13004, section 4.
"""

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from pipeline.models.coda_base import LOGIT_BIAS, CoDAStagedNet, build_coda, default_cfg
from pipeline.models.dau import DAUConv2d, Norm
from pipeline.models.dau.layer import require_whole


class CoDANet(CoDAStagedNet):
    """A plain chain of DAU convolutions: dynamic linear from the encoded image to the logits.

    Args:
        kernels: kernel size of each layer but the classifier; padding is kernel // 2.
        strides: of each layer but the classifier.
        units: of each layer but the classifier.
        ranks: of each layer but the classifier.
        head_rank: of the classifying layer.
        head_kernel: kernel size of the classifying layer.
        rank: if given, the base rank; every rank is scaled by rank / ranks[0] (the official rank
            ablation).
        coda_width: if given, units of the first layer; all are scaled by coda_width / units[0].
        norm: rescaling of the dynamic weights, see :class:`DAUConv2d`.
        temperature: T of :class:`CoDAHead`.
        logit_bias: b0 of :class:`CoDAHead`.
        num_classes: as timm defines it.
        in_chans: as timm defines it.
        global_pool: "sum" or "".
    """

    def __init__(
        self,
        kernels: Sequence[int],
        strides: Sequence[int],
        units: Sequence[int],
        ranks: Sequence[int],
        head_rank: int,
        head_kernel: int = 1,
        rank: int | None = None,
        coda_width: int | None = None,
        norm: Norm = "sq",
        temperature: float = 1000.0,
        logit_bias: float = LOGIT_BIAS,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "sum",
    ):
        _check_layers(kernels=kernels, strides=strides, units=units, ranks=ranks)
        scales = {"rank": rank, "coda_width": coda_width}
        require_whole(**{name: size for name, size in scales.items() if size is not None})
        *layer_ranks, head_rank = _scaled([*ranks, head_rank], rank)
        stages: dict[str, nn.Sequential] = {}
        info: list[dict[str, Any]] = []
        channels, reduction = 2 * in_chans, 1
        for kernel, stride, out, layer_rank in zip(
            kernels, strides, _scaled(units, coda_width), layer_ranks, strict=True
        ):
            reduction *= stride
            if stride > 1 or not stages:
                stages[f"stage{len(stages) + 1}"] = nn.Sequential()
                info.append({})
            name, stage = list(stages.items())[-1]
            stage.append(
                DAUConv2d(
                    channels,
                    out,
                    kernel,
                    stride=stride,
                    padding=kernel // 2,
                    rank=layer_rank,
                    norm=norm,
                )
            )
            info[-1] = dict(num_chs=out, reduction=reduction, module=name)
            channels = out
        super().__init__(
            stages,
            info,
            num_classes,
            in_chans,
            global_pool,
            head_rank=head_rank,
            head_kernel=head_kernel,
            norm=norm,
            temperature=temperature,
            logit_bias=logit_bias,
        )


def _check_layers(**layers: Sequence[int]) -> None:
    """Raise ValueError if one of ``layers`` is not a list of whole numbers of at least 1."""
    for name, sizes in layers.items():
        if isinstance(sizes, str) or not isinstance(sizes, Sequence):
            raise ValueError(
                f"{name} is {sizes!r}; it must be a list of whole numbers, one for each layer"
            )
        require_whole(**{f"{name}[{index}]": size for index, size in enumerate(sizes)})


def _scaled(sizes: Sequence[int], first: int | None) -> list[int]:
    """Scale ``sizes`` in proportion so that they start with ``first``, to at least 1 each."""
    if first is None:
        return list(sizes)
    return [max(1, round(size * first / sizes[0])) for size in sizes]


default_cfgs = generate_default_cfgs(
    {
        "coda_xs.untrained": default_cfg(32, 4, 10, "stage1.0.down"),
        "coda_s.untrained": default_cfg(32, 4, 10, "stage1.0.down"),
        "coda_m.untrained": default_cfg(32, 4, 10, "stage1.0.down"),
        "coda_l.untrained": dict(default_cfg(240, 12, 100, "stage1.0.down"), crop_pct=240 / 256),
        "coda_xl.untrained": default_cfg(64, 4, 200, "stage1.0.down"),
    }
)


@register_model
def coda_xs(pretrained: bool = False, **kwargs: Any) -> CoDANet:
    """Build XS-CoDA, of this project, for short training runs on 32x32 images.

    Six wide layers of low rank, two at half the resolution, four at a quarter.
    """
    sizes = dict(
        kernels=[5, 3, 3, 3, 3],
        strides=[2, 1, 2, 1, 1],
        units=[32, 32, 64, 64, 64],
        ranks=[8, 8, 8, 16, 16],
        head_rank=16,
        temperature=10_000.0,
    )
    return build_coda(CoDANet, "coda_xs", pretrained, 2, sizes, kwargs)


@register_model
def coda_s(pretrained: bool = False, **kwargs: Any) -> CoDANet:
    """Build S-CoDA of the official code, for CIFAR-10.

    Nine layers, 16 to 64 units, ranks 32 and 64.
    """
    sizes = dict(
        kernels=[3] * 8,
        strides=[1, 1, 2, 1, 1, 2, 1, 1],
        units=[16, 16, 32, 32, 32, 64, 64, 64],
        ranks=[32, 32, 64, 64, 64, 64, 64, 64],
        head_rank=64,
    )
    return build_coda(CoDANet, "coda_s", pretrained, 3, sizes, kwargs)


@register_model
def coda_m(pretrained: bool = False, **kwargs: Any) -> CoDANet:
    """Build M-CoDA, of this project, for 32x32 images.

    The resolutions of S with the units of L and ranks half-way.
    """
    sizes = dict(
        kernels=[3] * 8,
        strides=[1, 1, 2, 1, 1, 2, 1, 1],
        units=[16, 32, 32, 64, 64, 64, 64, 64],
        ranks=[32, 32, 64, 64, 64, 128, 128, 128],
        head_rank=128,
    )
    return build_coda(CoDANet, "coda_m", pretrained, 3, sizes, kwargs)


@register_model
def coda_l(pretrained: bool = False, **kwargs: Any) -> CoDANet:
    """Build L-CoDA of the official code, for 100 classes of ImageNet at 240x240.

    Its classifying layer is 3x3.
    """
    sizes = dict(
        kernels=[7, *[3] * 7],
        strides=[3, 1, 1, 2, 1, 1, 2, 1],
        units=[16, 32, 32, 64, 64, 64, 64, 64],
        ranks=[64, 64, 64, 128, 128, 128, 256, 256],
        head_rank=256,
        head_kernel=3,
        temperature=100_000.0,
    )
    return build_coda(CoDANet, "coda_l", pretrained, 3, sizes, kwargs)


@register_model
def coda_xl(pretrained: bool = False, **kwargs: Any) -> CoDANet:
    """Build XL-CoDA, of this project, for TinyImagenet (200 classes, 64x64).

    Twice the units and ranks of S.
    """
    sizes = dict(
        kernels=[3] * 8,
        strides=[1, 1, 2, 1, 1, 2, 1, 1],
        units=[32, 32, 64, 64, 64, 128, 128, 128],
        ranks=[64, 64, 128, 128, 128, 128, 128, 128],
        head_rank=128,
        temperature=10_000.0,
    )
    return build_coda(CoDANet, "coda_xl", pretrained, 3, sizes, kwargs)
