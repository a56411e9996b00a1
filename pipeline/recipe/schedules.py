"""Learning rate and training resolution as pure functions of how far a run is.

A new schedule of the learning rate is one function and one entry in ``SCHEDULES``.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.recipe.schema import DataRecipe, TrainingRecipe

Schedule = Callable[[float, int, "TrainingRecipe"], float]


def cosine(progress: float, epoch: int, training: "TrainingRecipe") -> float:
    """Half a cosine from the peak down to 0."""
    return training.learning_rate * (0.5 * (1 + math.cos(math.pi * progress)))


def linear(progress: float, epoch: int, training: "TrainingRecipe") -> float:
    """A straight line from the peak down to 0."""
    return training.learning_rate * (1 - progress)


def step(progress: float, epoch: int, training: "TrainingRecipe") -> float:
    """The peak, divided by ``step_factor`` each ``step_epochs`` from the first epoch on."""
    return training.learning_rate / training.step_factor ** (epoch // training.step_epochs)


# Name -> rate after the warm-up, from the share of the updates after the warm-up that are done,
# the epoch from 0, and the recipe.
SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "linear": linear, "step": step}


def learning_rate(update: int, updates_per_epoch: int, training: "TrainingRecipe") -> float:
    """Rate of update number ``update`` (from 0).

    It rises linearly over ``warmup_epochs``, and then follows the recipe's schedule.
    """
    peak = training.learning_rate
    total = training.epochs * updates_per_epoch
    warmup = round(training.warmup_epochs * updates_per_epoch)
    if update < warmup:
        start = training.warmup_learning_rate
        return start + (peak - start) * (update + 1) / warmup
    progress = (update - warmup) / max(total - warmup, 1)
    return SCHEDULES[training.schedule](progress, update // updates_per_epoch, training)


def training_size(data: "DataRecipe", epoch: int, epochs: int) -> int:
    """Side in pixels of the training images of ``epoch`` (from 0) of ``epochs``.

    It rises linearly, in steps, where the recipe asks for that.
    """
    if data.progressive is None:
        return data.image_size
    missing = (data.image_size - data.progressive.start_size) * max(
        0.0, 1 - epoch / (data.progressive.until * epochs)
    )
    return data.image_size - round(missing / data.progressive.step) * data.progressive.step
