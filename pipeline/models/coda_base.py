"""The base of pure CoDA networks and hybrids: the encoding, the start of the DAUs, the head.

Source: Böhle, Fritz, Schiele, arXiv 2109.13004, section 4.
"""

import math
from typing import Any, TypeVar

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from pipeline.models.dau import DAUConv2d, Norm
from pipeline.models.pretrained import adapt_checkpoint
from pipeline.models.staged import StagedNet, build

Network = TypeVar("Network", bound="CoDAStagedNet")
# With it an untrained network says "10 %" for every class.
LOGIT_BIAS = math.log(0.1 / 0.9)

# A DAU is a leaf of torch.fx graphs: its loops depend on shapes.
register_notrace_module(DAUConv2d)


def encode(images: Tensor) -> Tensor:
    """Encode images (B, C, H, W) in [0, 1] as [x, 1 - x], (B, 2 C, H, W).

    RGB becomes [r, g, b, 1-r, 1-g, 1-b], in which black is as visible as white.
    """
    return torch.cat([images, 1 - images], dim=1)


@torch.no_grad()
def initialise(layer: DAUConv2d) -> None:
    """Draw A, B and b so that the signal keeps its size through a chain of layers.

    It does so whatever their rank and norm. A unit's output is at most |x|, and shrinks by the
    factor that g leaves of a random weight's norm; a chain of nine multiplies nine of these.

    * ``sq``: |b| = 3, hence mostly |w| >= 3 at the start, and g leaves |w|^2 / (1 + |w|^2) = 0.9 of
      it.
    * ``wb``: a random A with a random z has |A z| near |A| |z| / sqrt(rank). So the columns of A,
      and the rows of B, start as one common vector plus as much noise, which gives |A z| near
      |A| |z| / 2.

    The rule is this project's own; docs/models.md has the measurement.
    """
    fan_in, rank = layer.up_weight.shape[1:]
    layer.down.reset_parameters()
    if layer.norm == "wb":
        common_row = torch.randn_like(layer.down.weight[:1])
        layer.down.weight.normal_().add_(common_row).div_(math.sqrt(2 * fan_in))
        common_column = torch.randn_like(layer.up_weight[:, :, :1])
        layer.up_weight.normal_().add_(common_column).div_(math.sqrt(2 * fan_in * rank))
        return
    nn.init.uniform_(layer.up_weight, -1 / math.sqrt(rank), 1 / math.sqrt(rank))
    if layer.up_bias is not None:
        bound = 3 * math.sqrt(3 / fan_in)
        nn.init.uniform_(layer.up_bias, -bound, bound)


class CoDAHead(nn.Module):
    """One dynamic alignment unit per class at every position: logit = (sum of outputs) / T + b0.

    Args:
        in_channels: of the features.
        num_classes: 0 leaves mean-pooled features.
        width: if given and the features have more channels, a 1x1 DAU first reduces them to as many
            (the classifying DAU alone would have in_channels * rank parameters per class).
        kernel: of the classifying DAU; padding is kernel // 2.
        rank: of these DAUs.
        norm: of these DAUs.
        temperature: T > 0; higher asks for more alignment.
        logit_bias: b0, the same for all classes.
        pool_type: "sum" for logits, "" to keep the map of outputs per position.

    Shape: (B, in_channels, H, W) -> (B, num_classes), with ``pool_type=""``
    (B, num_classes, H, W) before T and b0.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        width: int | None,
        kernel: int,
        rank: int,
        norm: Norm,
        temperature: float,
        logit_bias: float,
        pool_type: str,
    ):
        super().__init__()
        if pool_type not in ("sum", ""):
            raise ValueError(
                f"global_pool is {pool_type!r}; a CoDA head pools by 'sum', or '' for none"
            )
        self.pool_type = pool_type
        self.temperature = temperature
        self.logit_bias = logit_bias
        self.reduce: nn.Module = nn.Identity()
        self.classifier: nn.Module = nn.Identity()
        if num_classes:
            if width and in_channels > width:
                self.reduce = DAUConv2d(in_channels, width, 1, rank=rank, norm=norm)
                in_channels = width
            self.classifier = DAUConv2d(
                in_channels, num_classes, kernel, padding=kernel // 2, rank=rank, norm=norm
            )

    def forward(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute the logits, or with ``pre_logits`` the mean-pooled features."""
        if pre_logits or isinstance(self.classifier, nn.Identity):
            return features.mean((2, 3)) if self.pool_type else features
        outputs: Tensor = self.classifier(self.reduce(features))
        if self.pool_type:
            return outputs.sum((2, 3)) / self.temperature + self.logit_bias
        return outputs


class CoDAStagedNet(StagedNet):
    """A staged network that reads the encoding [x, 1 - x] and ends in a :class:`CoDAHead`."""

    def __init__(
        self,
        *args: Any,
        head_rank: int,
        head_kernel: int = 1,
        head_width: int | None = None,
        norm: Norm,
        temperature: float,
        logit_bias: float,
        **kwargs: Any,
    ):
        if not isinstance(temperature, int | float) or not temperature > 0:
            raise ValueError(f"temperature is {temperature!r}; it must be a positive number")
        # Plain attributes, which may be set before the module's constructor, which builds the head.
        self._temperature = temperature
        self._logit_bias = logit_bias
        self._head_args: dict[str, Any] = dict(
            width=head_width,
            kernel=head_kernel,
            rank=head_rank,
            norm=norm,
            temperature=temperature,
            logit_bias=logit_bias,
        )
        super().__init__(*args, **kwargs)
        # timm must not adapt weights to other input channels: `adapt_checkpoint` does.
        self._traits = dict(first_conv=None)
        for name in self.stage_names:
            for module in self.get_submodule(name).modules():
                if isinstance(module, DAUConv2d):
                    initialise(module)

    @property
    def temperature(self) -> float:
        """T: contributions sum to T * (logit - b0)."""
        return self._temperature

    @property
    def logit_bias(self) -> float:
        """b0, the logit of an image that nothing aligns with."""
        return self._logit_bias

    def encode(self, images: Tensor) -> Tensor:
        """Encode images as [x, 1 - x]; see :func:`encode`."""
        return encode(images)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that timm's optimiser factory must not decay.

        They are the biases of the dynamic weights, matrices though they are.
        """
        return {name for name, _ in self.named_parameters() if name.endswith("up_bias")}

    def new_head(self, num_classes: int, global_pool: str) -> nn.Module:
        """Build and draw the head; see :meth:`StagedNet.new_head`."""
        head = CoDAHead(self.num_features, num_classes, pool_type=global_pool, **self._head_args)
        for module in head.children():
            if isinstance(module, DAUConv2d):
                initialise(module)
        return head


def build_coda(
    cls: type[Network],
    name: str,
    pretrained: bool,
    levels: int,
    sizes: dict[str, Any],
    options: dict[str, Any],
) -> Network:
    """Build a registered network of ``sizes``, changed by the caller's ``options``.

    With ``pretrained`` weights the option pretrained_backbone is left out.
    """
    if pretrained:
        options = {key: value for key, value in options.items() if key != "pretrained_backbone"}
    return build(
        cls, name, pretrained, levels, pretrained_filter_fn=adapt_checkpoint, **{**sizes, **options}
    )


def default_cfg(
    size: int,
    reduction: int,
    classes: int,
    first_conv: str,
    classifier: str = "head.classifier.down",
) -> dict[str, Any]:
    """Describe a model without published weights as timm does; it reads RGB in [0, 1].

    Args:
        size: height and width of the input in pixels.
        reduction: of the last features.
        classes: number of logits.
        first_conv: name of a module that has a ``weight``; of a DAU that is its projection B.
        classifier: name of a module that has a ``weight``.
    """
    side = math.ceil(size / reduction)
    return dict(
        num_classes=classes,
        input_size=(3, size, size),
        pool_size=(side, side),
        crop_pct=1.0 if size <= 64 else 0.875,
        interpolation="bicubic",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        first_conv=first_conv,
        classifier=classifier,
    )
