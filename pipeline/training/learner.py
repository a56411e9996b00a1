"""What learns: the network under its engine, its loss and optimiser, and the average of weights."""

from collections.abc import Iterator

import torch

# timm re-exports it without saying so.
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]
from torch import Tensor, nn

from pipeline.data.epoch_loader import Batch, unit_range
from pipeline.distributed import World, average_buffers
from pipeline.models.create import build_model
from pipeline.recipe.schema import Recipe
from pipeline.training.engine import build_engine
from pipeline.training.losses import LOSSES, soft_targets
from pipeline.training.optim import build_optimizer
from pipeline.training.penalty import DynamicWeightPenalty


class Learner:
    """A network that can be updated. Every process of the run has one.

    Args:
        recipe: model, loss, optimiser, seed.
        classes: how many there are.
        world: this process among all.
        fresh: False if the weights of a checkpoint will be loaded.

    Attributes:
        engine: DeepSpeed's, around the network.
        average: of the network's weights; None if the recipe asks for none.
        accumulation: backward passes of an update.

    Raises:
        UserError: the model cannot be built, or does not fit the recipe.
    """

    def __init__(self, recipe: Recipe, classes: int, world: World, *, fresh: bool):
        training = recipe.training
        self._recipe, self._world = recipe, world
        _, self.accumulation = recipe.micro_batch(world.size)
        # Of the initial weights, and of what a model draws itself, such as dropout.
        torch.manual_seed(recipe.seed)
        model = build_model(recipe.model, classes, fresh=fresh).to(world.device)
        self._averaging = (
            ModelEmaV3(model, training.weight_average, use_warmup=True)
            if training.weight_average
            else None
        )
        self.average: nn.Module | None = self._averaging.module if self._averaging else None
        self._loss = LOSSES[training.loss]
        self._penalty = (
            DynamicWeightPenalty(model, training.weight_penalty, recipe.seed)
            if training.weight_penalty
            else None
        )
        self.engine = build_engine(recipe, model, build_optimizer(model, training), world)

    @property
    def result(self) -> nn.Module:
        """What is evaluated and exported: the average of the weights, if there is one."""
        return self.engine.module if self.average is None else self.average

    def update(self, batches: Iterator[Batch], number: int, rate: float) -> Tensor:
        """Do one optimiser update on the next ``accumulation`` batches.

        Args:
            batches: micro batches of this process.
            number: of the update, from 0.
            rate: the learning rate.

        Returns:
            this process's part of the mean loss of the global batch, a scalar on the device.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self._world.device)
        for _ in range(self.accumulation):
            loss = self._loss_of(next(batches), number)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / (self.accumulation * self._world.size)
        if self._averaging:
            self._averaging.update(self.engine.module, step=number + 1)
        return total

    def average_buffers(self) -> None:
        """Make the batch norm statistics of all processes equal. Every process must call it."""
        average_buffers(self.engine.module)
        if self.average is not None:
            average_buffers(self.average)

    def _loss_of(self, batch: Batch, number: int) -> Tensor:
        device = self._world.device
        logits = self.engine(unit_range(batch.images, device)).float()
        labels = batch.labels.to(device)
        classes = labels if batch.targets is None else batch.targets.to(device)
        smoothing = self._recipe.training.label_smoothing
        loss = self._loss(logits, soft_targets(classes, logits.shape[1], smoothing))
        return loss + self._penalty(labels, number) if self._penalty else loss
