"""The regulariser mean |W_{0->L}| of the official code, which asks for sparse maps.

Source: Böhle, Fritz, Schiele, arXiv 2109.13004.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.interpret.network import dynamic_modules, explaining, parts

# Classes whose weights are penalised in every image: its own and four random ones.
CLASSES = 5


class DynamicWeightPenalty:
    """Penalty of the size of W in T (logit - b0) = W a, with a the input of the CoDA part.

    It is ``strength`` times the mean of |W| over the image's own class and ``CLASSES - 1`` others,
    which depend on nothing but seed and update. It costs two more backward passes through the CoDA
    part for each class.

    Args:
        model: a network with dynamic layers.
        strength: lambda.
        seed: of the run.

    Raises:
        UserError: the model has no dynamic layer.
    """

    def __init__(self, model: nn.Module, strength: float, seed: int):
        self.dynamic = dynamic_modules(model)
        if not self.dynamic:
            raise UserError(
                "training.weight_penalty needs a model with DAU layers (coda_...); "
                "this one has no dynamic weights"
            )
        self.model, self.strength, self.seed = model, strength, seed
        # The input of the first dynamic layer in the last forward pass.
        self.junction: Tensor | None = None
        self.logits: Tensor | None = None
        model.register_forward_pre_hook(self._forget)
        model.register_forward_hook(self._keep)
        for module in self.dynamic:
            module.register_forward_pre_hook(self._remember)

    def _forget(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.junction = self.logits = None

    def _keep(self, model: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        if self.junction is None:
            return None
        self.logits = logits
        # An engine watches what a model returns, and lets no gradient pass but its own.
        return logits.clone()

    def _remember(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.junction is not None or not torch.is_grad_enabled():
            # This is not the first dynamic layer, or the model is not being trained.
            return None
        (x,) = inputs
        self.junction = x if x.requires_grad else x.detach().requires_grad_()
        return (self.junction,)

    def classes(self, labels: Tensor, num_classes: int, update: int) -> Tensor:
        """Choose the classes (B, K) int64: the label of each image, then up to CLASSES - 1 others.

        The others lie at random offsets from the label, the same in all images.
        """
        state = np.random.SeedSequence([self.seed, update]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        others = 1 + torch.randperm(num_classes - 1, generator=generator)[: CLASSES - 1]
        offsets = torch.cat([others.new_zeros(1), others]).to(labels.device)
        return (labels[:, None] + offsets) % num_classes

    def __call__(self, labels: Tensor, update: int) -> Tensor:
        """Compute the penalty, a scalar, of the last forward pass.

        Args:
            labels: (B,) of its images.
            update: number of the update.
        """
        assert self.junction is not None
        assert self.logits is not None
        classes = self.classes(labels, self.logits.shape[1], update)
        chosen = float(parts(self.model).temperature) * self.logits.gather(1, classes)
        sizes = []
        with explaining(self.dynamic):
            for outputs in chosen.unbind(1):
                (weights,) = torch.autograd.grad(outputs.sum(), self.junction, create_graph=True)
                sizes.append(weights.abs().mean())
        return self.strength * torch.stack(sizes).mean()
