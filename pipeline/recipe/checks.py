"""Checks of a whole recipe: the range of every field, and rules that join several fields."""

import dataclasses
import typing
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import UserError
from pipeline.recipe.optimisers import OPTIMISERS
from pipeline.recipe.ranges import Range
from pipeline.recipe.schema import Recipe

# A key, its value, and what would be valid in words.
Problem = tuple[str, Any, str]


def check(recipe: Recipe, where: str) -> None:
    """Check that every value of ``recipe``, which comes from ``where``, is valid.

    Raises:
        UserError: a value is out of its range, or does not fit another one.
    """
    for problems in (_out_of_range, *RULES):
        for key, value, remedy in problems(recipe):
            raise UserError(f"{where}: {key} is {value!r}; {remedy}")


def ranges(hint: Any) -> Iterator[Range]:
    """Ranges in the annotation ``hint`` of a field, as get_type_hints with extras gives it."""
    yield from getattr(hint, "__metadata__", ())
    for inner in typing.get_args(hint):
        if typing.get_origin(inner) is typing.Annotated:
            yield from ranges(inner)


def _out_of_range(section: Any, prefix: str = "") -> Iterator[Problem]:
    """Fields of the dataclass ``section``, and of those in it, that are out of their ranges."""
    hints = typing.get_type_hints(type(section), include_extras=True)
    for field in dataclasses.fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _out_of_range(value, f"{key}.")
        elif value is not None:
            for valid in ranges(hints[field.name]):
                if not valid.allows(value):
                    yield key, value, valid.remedy


def _padding_is_smaller_than_the_image(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if data.crop_padding >= data.image_size:
        remedy = f"it must be below data.image_size, {data.image_size}"
        yield "data.crop_padding", data.crop_padding, remedy


def _scratch_belongs_to_staging(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if data.scratch is not None and data.storage != "stage_local":
        remedy = "it must be null, as data.storage is not stage_local"
        yield "data.scratch", data.scratch, remedy


def _sizes_rise_to_the_image_size(recipe: Recipe) -> Iterator[Problem]:
    if (progressive := recipe.data.progressive) is None:
        return
    image_size, start, step = recipe.data.image_size, progressive.start_size, progressive.step
    if start > image_size:
        remedy = f"it must be between 1 and data.image_size, {image_size}"
        yield "data.progressive.start_size", start, remedy
    elif step > max(image_size - start, 1):
        most = max(image_size - start, 1)
        remedy = f"it must be between 1 and the difference of the sizes, {most}"
        yield "data.progressive.step", step, remedy


def _zero_leaves_matrices_whole(recipe: Recipe) -> Iterator[Problem]:
    training = recipe.training
    if OPTIMISERS[training.optimizer].needs_whole_matrices and training.zero_stage:
        remedy = (
            "it must be another one, or training.zero_stage 0: ZeRO's shards are not whole matrices"
        )
        yield "training.optimizer", training.optimizer, remedy


def _warmup_fits_the_epochs(recipe: Recipe) -> Iterator[Problem]:
    epochs, warmup = recipe.training.epochs, recipe.training.warmup_epochs
    if warmup > epochs:
        example = f"training.warmup_epochs={epochs / 20:.2g}"
        remedy = f"it must be between 0 and epochs, so at most {epochs}, e.g. {example}"
        yield "training.warmup_epochs", warmup, remedy


def _warmup_rises(recipe: Recipe) -> Iterator[Problem]:
    start, peak = recipe.training.warmup_learning_rate, recipe.training.learning_rate
    if start > peak:
        remedy = f"it must be between 0 and training.learning_rate, {peak:g}"
        yield "training.warmup_learning_rate", start, remedy


RULES: tuple[Callable[[Recipe], Iterator[Problem]], ...] = (
    _padding_is_smaller_than_the_image,
    _scratch_belongs_to_staging,
    _sizes_rise_to_the_image_size,
    _zero_leaves_matrices_whole,
    _warmup_fits_the_epochs,
    _warmup_rises,
)
