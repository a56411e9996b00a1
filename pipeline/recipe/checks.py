"""Ranges of a recipe's values, and what depends on more than one of them."""

from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.recipe.schema import MAX_RESOLUTION, DataRecipe, Recipe


def check(recipe: Recipe, where: str) -> None:
    training, data, evaluation = recipe.training, recipe.data, recipe.evaluation
    every_save, shares = (
        training.checkpoint_every_updates,
        ("compress_probability", "color_jitter", "random_erasing"),
    )
    rules = [
        (
            "name",
            recipe.name,
            bool(recipe.name) and Path(recipe.name).name == recipe.name,
            "a single folder name",
        ),
        ("seed", recipe.seed, 0 <= recipe.seed < 2**32, "between 0 and 2^32 - 1"),
        *(
            (f"data.{key}", getattr(data, key), getattr(data, key) > 0, "at least 1")
            for key in ("image_size", "workers")
        ),
        *(
            (f"data.{key}", getattr(data, key), 0 <= getattr(data, key) <= 1, "in [0, 1]")
            for key in shares
        ),
        (
            "data.jpeg_quality",
            data.jpeg_quality,
            1 <= data.jpeg_quality <= 100,
            "between 1 and 100",
        ),
        (
            "data.max_resolution",
            data.max_resolution,
            0 < (data.max_resolution or 1) <= MAX_RESOLUTION,
            f"between 1 and {MAX_RESOLUTION}",
        ),
        ("data.chunk_size", data.chunk_size, 0 < data.chunk_size <= 10_000, "between 1 and 10,000"),
        (
            "data.crop_padding",
            data.crop_padding,
            0 <= data.crop_padding < data.image_size,
            "between 0 and the image size",
        ),
        (
            "data.rand_augment_operations",
            data.rand_augment_operations,
            0 <= data.rand_augment_operations <= 16,
            "between 0 and 16",
        ),
        (
            "data.rand_augment_magnitude",
            data.rand_augment_magnitude,
            0 <= data.rand_augment_magnitude <= 30,
            "between 0 and 30",
        ),
        *(
            (f"data.{key}", value, 0 <= value < 1000, "0 (off) or more")
            for key, value in vars(data).items()
            if key.endswith("_alpha")
        ),
        (
            "data.eval_size",
            data.eval_size,
            data.eval_size is None or data.eval_size > 0,
            "at least 1",
        ),
        (
            "data.shuffle_pages",
            data.shuffle_pages,
            data.shuffle_pages is None or data.shuffle_pages > 0,
            "at least 1",
        ),
        (
            "data.scratch",
            data.scratch,
            data.scratch is None or data.storage == "stage_local",
            "null, as data.storage is not stage_local",
        ),
        *_progressive_rules(data),
        ("training.epochs", training.epochs, training.epochs > 0, "at least 1"),
        (
            "training.global_batch_size",
            training.global_batch_size,
            training.global_batch_size > 0,
            "at least 1",
        ),
        (
            "training.micro_batch_size",
            training.micro_batch_size,
            (training.micro_batch_size or 1) > 0,
            "at least 1",
        ),
        (
            "training.learning_rate",
            training.learning_rate,
            0 < training.learning_rate < float("inf"),
            "positive and finite",
        ),
        (
            "training.optimizer",
            training.optimizer,
            training.optimizer != "muon" or not training.zero_stage,
            "another where training.zero_stage is not 0: shards are no matrices",
        ),
        ("training.weight_decay", training.weight_decay, training.weight_decay >= 0, "0 or more"),
        (
            "training.weight_penalty",
            training.weight_penalty,
            0 <= training.weight_penalty < float("inf"),
            "0 (off) or more",
        ),
        ("training.momentum", training.momentum, 0 <= training.momentum < 1, "in [0, 1)"),
        (
            "training.warmup_epochs",
            training.warmup_epochs,
            0 <= training.warmup_epochs <= training.epochs,
            f"between 0 and epochs, so at most {training.epochs}, e.g. training.warmup_epochs={training.epochs / 20:.2g}",
        ),
        (
            "training.warmup_learning_rate",
            training.warmup_learning_rate,
            0 <= training.warmup_learning_rate <= training.learning_rate,
            "between 0 and learning_rate",
        ),
        ("training.step_epochs", training.step_epochs, training.step_epochs > 0, "at least 1"),
        (
            "training.step_factor",
            training.step_factor,
            1 <= training.step_factor < float("inf"),
            "at least 1",
        ),
        (
            "training.weight_average",
            training.weight_average,
            0 <= training.weight_average < 1,
            "in [0, 1)",
        ),
        (
            "training.label_smoothing",
            training.label_smoothing,
            0 <= training.label_smoothing < 1,
            "in [0, 1)",
        ),
        (
            "training.clip_grad_norm",
            training.clip_grad_norm,
            training.clip_grad_norm >= 0,
            "0 (off) or more",
        ),
        (
            "training.zero_stage",
            training.zero_stage,
            training.zero_stage in (0, 1, 2),
            "0, 1 or 2 (stage 3 shards the parameters themselves, which models of this size do not need)",
        ),
        (
            "training.checkpoint_every_updates",
            every_save,
            every_save is None or every_save > 0,
            "at least 1",
        ),
        *(
            (f"evaluation.{key}", value, value > 0, "at least 1")
            for key, value in vars(evaluation).items()
            if type(value) is int
        ),
        ("evaluation.grid_size", evaluation.grid_size, evaluation.grid_size > 1, "at least 2"),
        ("evaluation.methods", evaluation.methods, bool(evaluation.methods), "one method or more"),
        (
            "tracking.parent",
            recipe.tracking.parent,
            not set("'\"`") & set(recipe.tracking.parent or "-"),
            "text without quotes",
        ),
        (
            "tracking.log_every_updates",
            recipe.tracking.log_every_updates,
            recipe.tracking.log_every_updates > 0,
            "at least 1",
        ),
    ]
    for key, value, valid, remedy in rules:
        if not valid:
            raise UserError(f"{where}: {key} is {value!r}; it must be {remedy}")


def _progressive_rules(data: DataRecipe) -> list[tuple[str, Any, bool, str]]:
    if (progressive := data.progressive) is None:
        return []
    start, step = progressive.start_size, progressive.step
    return [
        (
            "data.progressive.start_size",
            start,
            0 < start <= data.image_size,
            "between 1 and data.image_size",
        ),
        (
            "data.progressive.until",
            progressive.until,
            0 < progressive.until <= 1,
            "above 0 and at most 1",
        ),
        (
            "data.progressive.step",
            step,
            0 < step <= max(data.image_size - start, 1),
            "between 1 and the difference of the sizes",
        ),
    ]
