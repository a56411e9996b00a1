"""A classifier as a chain of stages and a head, with the methods that timm expects of a model."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from timm.models import build_model_with_cfg, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

Network = TypeVar("Network", bound="StagedNet")


class StagedNet(nn.Module):
    """Stages, then a head. Takes images in [0, 1] without mean/std normalisation.

    Subclasses override :meth:`encode` where the network reads another encoding of the image, and
    :meth:`new_head`.

    Args:
        stages: the stages by name, in order; each is one feature level. "stem" and "stage1",
            "stage2", ... have a meaning in :meth:`group_matcher` and
            :meth:`set_grad_checkpointing`.
        feature_info: timm's description of every stage: num_chs, reduction, module.
        num_classes: 0 for a headless feature extractor.
        in_chans: channels of the images.
        global_pool: pooling of the head, or "" for none.
    """

    output_fmt = "NCHW"

    head: nn.Module

    def __init__(
        self,
        stages: Mapping[str, nn.Sequential],
        feature_info: list[dict[str, Any]],
        num_classes: int,
        in_chans: int,
        global_pool: str,
    ):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.feature_info = feature_info
        self.num_features = self.head_hidden_size = feature_info[-1]["num_chs"]
        self.grad_checkpointing = False
        self.stage_names = list(stages)
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.head = self.new_head(num_classes, global_pool)

    def new_head(self, num_classes: int, global_pool: str) -> nn.Module:
        """Build a head from ``num_features`` channels to ``num_classes`` logits.

        Its attribute ``classifier`` holds the layer that gives one output per class, ``pool_type``
        the pooling.
        """
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """Compute what the first layer reads from ``images`` (B, in_chans, H, W) in [0, 1]."""
        return images

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute the features (B, num_features, H', W') before the head."""
        return self._features(self.encode(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute the logits (B, num_classes) of ``features``.

        With ``pre_logits``, compute the pooled features (B, num_features) instead.
        """
        logits: Tensor = self.head(features, pre_logits=pre_logits)
        return logits

    def forward_encoded(self, encoded: Tensor) -> Tensor:
        """Compute the logits (B, num_classes) of images that are encoded already."""
        return self.forward_head(self._features(encoded))

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits (B, num_classes) of ``images`` (B, in_chans, H, W) in [0, 1]."""
        return self.forward_encoded(self.encode(images))

    def _features(self, encoded: Tensor) -> Tensor:
        x = encoded
        for name in self.stage_names:
            x = self._stage(name, x)
        return x

    def _stage(self, name: str, x: Tensor) -> Tensor:
        stage: nn.Module = getattr(self, name)
        # A stem's in-place activation must not be recomputed on its own.
        recomputed = self.grad_checkpointing and name != "stem"
        y: Tensor = checkpoint_seq(stage, x) if recomputed else stage(x)
        return y

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the outputs of the stages, as timm's models do.

        Args:
            x: images.
            indices: the last so many stages, or those listed, or all.
            norm: without effect, as these networks end in no normalisation.
            stop_early: whether to leave out the stages after the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: whether to leave out the final features.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; valid: NCHW")
        take, last = feature_take_indices(len(self.stage_names), indices)
        features = self.encode(x)
        intermediates = []
        names = self.stage_names[: last + 1] if stop_early else self.stage_names
        for index, name in enumerate(names):
            features = self._stage(name, features)
            if index in take:
                intermediates.append(features)
        return intermediates if intermediates_only else (features, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages (and the head) that ``indices`` do not need."""
        take, last = feature_take_indices(len(self.stage_names), indices)
        for name in self.stage_names[last + 1 :]:
            delattr(self, name)
        self.stage_names = self.stage_names[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The layer that gives one output per class."""
        return self.head.get_submodule("classifier")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one.

        Args:
            num_classes: 0 leaves a feature extractor.
            global_pool: pooling of the head; None keeps it.
        """
        self.num_classes = num_classes
        reference = next(self.parameters())
        pool = str(self.head.pool_type) if global_pool is None else global_pool
        self.head = self.new_head(num_classes, pool).to(reference).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of the stages in the backward pass, or keep their activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Match the groups of parameters that timm gives layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^stage(\d+)" if coarse else r"^stage(\d+)\.(\d+)"}


def build(
    cls: type[Network],
    name: str,
    pretrained: bool,
    levels: int,
    *,
    device: Any = None,
    dtype: Any = None,
    **kwargs: Any,
) -> Network:
    """Call timm's ``build_model_with_cfg`` for a staged network.

    Args:
        cls: the network.
        name: under which it is registered.
        pretrained: whether to load weights.
        levels: feature levels of ``features_only``, which goes through ``forward_intermediates``
            and so encodes the image first.
        device: of the parameters.
        dtype: of the parameters.
        kwargs: of ``cls``, and those of timm (``features_only``, ``pretrained_cfg_overlay``, ...).

    Returns:
        The network, with ``features_only`` inside timm's wrapper.
    """
    feature_cfg = dict(feature_cls="getter", out_indices=tuple(range(levels)))
    with torch.device(device) if device is not None else nullcontext():
        model: Network = build_model_with_cfg(
            cls, name, pretrained, feature_cfg=feature_cfg, **kwargs
        )
    return model.to(dtype=dtype)
