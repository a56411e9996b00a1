"""Pure CoDA networks (Böhle, Fritz, Schiele, arXiv 2109.13004, section 4; sizes as in the official code)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from pipeline.models.dau import DAUConv2d, Norm
from pipeline.models.staged import StagedNet

FEATURES = dict(feature_cls="getter")  # features_only through forward_intermediates, which encodes the image first
LOGIT_BIAS = math.log(0.1 / 0.9)  # an untrained network says "10 %" for every class


def encode(images: Tensor) -> Tensor:
    """[r, g, b, 1-r, 1-g, 1-b] (B, 6, H, W) of RGB images (B, 3, H, W) in [0, 1]: black is as visible as white."""
    return torch.cat([images, 1 - images], dim=1)


class CoDAHead(nn.Module):
    """One dynamic alignment unit per class on every position, summed over positions: logit = sum / T + b0.

    Args:
        in_channels, num_classes: num_classes 0 leaves mean-pooled features.
        rank, norm: of the classifying 1x1 DAU.
        temperature: T > 0; higher asks for more alignment.
        logit_bias: b0, the same for all classes.
        pool: "sum" for logits, "" to keep the map of outputs per position.

    Shape: (B, in_channels, H, W) -> (B, num_classes), with ``pool=""`` (B, num_classes, H, W) before T and b0.
    """

    def __init__(self, in_channels: int, num_classes: int, *, rank: int, norm: Norm, temperature: float, logit_bias: float, pool: str):
        super().__init__()
        if pool not in ("sum", ""):
            raise ValueError(f"global_pool is {pool!r}; a CoDA head pools by 'sum', or '' for none")
        self.pool, self.temperature, self.logit_bias = pool, temperature, logit_bias
        self.classifier = DAUConv2d(in_channels, num_classes, 1, rank=rank, norm=norm) if num_classes else nn.Identity()

    def forward(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or isinstance(self.classifier, nn.Identity):
            return features.mean((2, 3)) if self.pool else features
        outputs = self.classifier(features)
        return outputs.sum((2, 3)) / self.temperature + self.logit_bias if self.pool else outputs


class CoDAStagedNet(StagedNet):
    """A staged network that reads the six-channel encoding and ends in a :class:`CoDAHead`."""

    def __init__(self, *args: Any, head_rank: int, norm: Norm, temperature: float, logit_bias: float, **kwargs: Any):
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be positive")
        self._head_args: dict[str, Any] = dict(rank=head_rank, norm=norm, temperature=temperature, logit_bias=logit_bias)
        super().__init__(*args, **kwargs)

    @property
    def temperature(self) -> float:
        """T: contributions sum to T * (logit - b0)."""
        return self._head_args["temperature"]

    @property
    def logit_bias(self) -> float:
        """b0, the logit of an image that nothing aligns with."""
        return self._head_args["logit_bias"]

    def encode(self, images: Tensor) -> Tensor:
        return encode(images)

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimiser factory must not decay: the biases of the dynamic weights, matrices though they are."""
        return {name for name, _ in self.named_parameters() if name.endswith("up_bias")}

    def new_head(self, num_classes: int, global_pool: str) -> nn.Module:
        return CoDAHead(self.num_features, num_classes, pool=global_pool, **self._head_args)


class CoDANet(CoDAStagedNet):
    """A plain chain of DAU convolutions: dynamic linear from the encoded image to the logits.

    Args:
        kernels, strides, units, ranks: of each layer but the classifier; padding is kernel // 2.
        head_rank: rank of the classifying layer.
        rank: if given, the base rank; every rank is scaled by rank / ranks[0] (the official rank ablation).
        norm: rescaling of the dynamic weights, see :class:`DAUConv2d`.
        temperature, logit_bias: T and b0 of :class:`CoDAHead`.
        num_classes, in_chans, global_pool: as timm defines them; global_pool is "sum" or "".
    """

    def __init__(
        self,
        kernels: Sequence[int],
        strides: Sequence[int],
        units: Sequence[int],
        ranks: Sequence[int],
        head_rank: int,
        rank: int | None = None,
        norm: Norm = "sq",
        temperature: float = 1000.0,
        logit_bias: float = LOGIT_BIAS,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "sum",
    ):
        scale = 1 if rank is None else rank / ranks[0]
        stages: list[tuple[str, nn.Sequential]] = []
        info: list[dict] = []
        channels, reduction = 6, 1
        for kernel, stride, out, layer_rank in zip(kernels, strides, units, ranks, strict=True):
            layer_rank = max(1, round(layer_rank * scale))
            layer = DAUConv2d(channels, out, kernel, stride=stride, padding=kernel // 2, rank=layer_rank, norm=norm)
            reduction *= stride
            if stride > 1 or not stages:
                stages.append((f"stage{len(stages) + 1}", nn.Sequential()))
                info.append({})
            stages[-1][1].append(layer)
            info[-1] = dict(num_chs=out, reduction=reduction, module=stages[-1][0])
            channels = out
        super().__init__(
            nn.Identity(),
            stages,
            [dict(num_chs=6, reduction=1, module="stem"), *info],
            num_classes,
            in_chans,
            global_pool,
            head_rank=max(1, round(head_rank * scale)),
            norm=norm,
            temperature=temperature,
            logit_bias=logit_bias,
        )


def default_cfg(size: int, reduction: int, classes: int, first_conv: str | None = None) -> dict[str, Any]:
    """timm's description of a model that has no published weights: square input of ``size`` pixels, [0, 1] RGB."""
    return dict(
        num_classes=classes,
        input_size=(3, size, size),
        pool_size=(-(-size // reduction), -(-size // reduction)),
        crop_pct=1.0 if size < 64 else 0.875,
        interpolation="bicubic",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        first_conv=first_conv,
        classifier="head.classifier",
    )


default_cfgs = generate_default_cfgs({"coda_s.untrained": default_cfg(32, 4, 10)})


@register_model
def coda_s(pretrained: bool = False, **kwargs: Any) -> CoDANet:
    """S-CoDA of the official code, for CIFAR-10: nine layers, 16 to 64 units, ranks 32 to 64."""
    sizes = dict(
        kernels=[3] * 8,
        strides=[1, 1, 2, 1, 1, 2, 1, 1],
        units=[16, 16, 32, 32, 32, 64, 64, 64],
        ranks=[32, 32, 64, 64, 64, 64, 64, 64],
        head_rank=64,
    )
    features = dict(FEATURES, out_indices=(0, 1, 2, 3))
    return build_model_with_cfg(CoDANet, "coda_s", pretrained, feature_cfg=features, **{**sizes, **kwargs})
