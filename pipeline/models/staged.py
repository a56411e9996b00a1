"""A classifier as stem, stages and head, with the methods that timm's users expect of every model."""

from collections.abc import Sequence

import torch
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class StagedNet(nn.Module):
    """stem -> stages -> head. Takes RGB images in [0, 1] without mean/std normalisation.

    Subclasses override :meth:`encode` where the network reads another encoding of the image, and :meth:`new_head`.

    Args:
        stem: first layers, (B, C, H, W) of the encoding to (B, C', H', W').
        stages: name of every stage and its blocks in order.
        feature_info: timm's description of the stem and of every stage: num_chs, reduction, module.
        num_classes: 0 for a headless feature extractor.
        in_chans: channels of the images; this family reads 3.
        global_pool: pooling of the head, or "" for none.
    """

    output_fmt = "NCHW"

    head: nn.Module

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[tuple[str, nn.Sequential]],
        feature_info: list[dict],
        num_classes: int,
        in_chans: int,
        global_pool: str,
    ):
        super().__init__()
        if in_chans != 3:
            raise ValueError(f"in_chans is {in_chans}; this model reads RGB images (3)")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.feature_info = feature_info
        self.num_features = self.head_hidden_size = feature_info[-1]["num_chs"]
        self.grad_checkpointing = False
        self.stem = stem
        self.stage_names = [name for name, _ in stages]
        for name, stage in stages:
            self.add_module(name, stage)
        self.head = self.new_head(num_classes, global_pool)

    def new_head(self, num_classes: int, global_pool: str) -> nn.Module:
        """A head from ``num_features`` channels to ``num_classes`` logits; its attribute ``classifier`` holds the layer."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """What the first layer reads, from RGB ``images`` (B, 3, H, W) in [0, 1]."""
        return images

    def forward_features(self, images: Tensor) -> Tensor:
        """Features (B, num_features, H', W') before the head."""
        return self._features(self.encode(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of ``features``, or with ``pre_logits`` pooled features (B, num_features)."""
        return self.head(features, pre_logits=pre_logits)

    def forward_encoded(self, encoded: Tensor) -> Tensor:
        """Logits (B, num_classes) of images that are encoded already."""
        return self.forward_head(self._features(encoded))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_encoded(self.encode(images))

    def _features(self, encoded: Tensor) -> Tensor:
        x = self.stem(encoded)
        for name in self.stage_names:
            x = self._stage(name, x)
        return x

    def _stage(self, name: str, x: Tensor) -> Tensor:
        stage = getattr(self, name)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stem and stages as timm's models give them: last ``indices``, or those listed, or all."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; valid: NCHW")
        take, last = feature_take_indices(len(self.stage_names) + 1, indices)
        x = self.stem(self.encode(images))
        intermediates = [x] if 0 in take else []
        for index, name in enumerate(self.stage_names[:last] if stop_early else self.stage_names, start=1):
            x = self._stage(name, x)
            if index in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop the stages (and the head) that ``indices`` do not need."""
        take, last = feature_take_indices(len(self.stage_names) + 1, indices)
        for name in self.stage_names[last:]:
            delattr(self, name)
        self.stage_names = self.stage_names[:last]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The layer that gives one output per class."""
        return self.head.get_submodule("classifier")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for ``num_classes``; 0 leaves a feature extractor."""
        self.num_classes = num_classes
        reference = next(self.parameters())
        pool = str(self.head.pool) if global_pool is None else global_pool
        self.head = self.new_head(num_classes, pool).to(reference)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute stages in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's groups of parameters for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^stage(\d+)" if coarse else r"^stage(\d+)\.(\d+)"}
