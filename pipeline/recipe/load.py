"""Reading recipes: a YAML file or plain data, with overrides, to checked, frozen dataclasses."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.recipe import parse
from pipeline.recipe.checks import check
from pipeline.recipe.schema import Recipe
from pipeline.run_folder import RunFolder

log = logging.getLogger(__name__)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check the recipe at ``path``.

    The overrides may ask for so few epochs that the file's warm-up fills them all. Unless they
    change the warm-up, too, it is shortened to its share of the file's epochs, and a warning says
    so.

    Args:
        path: a YAML file.
        overrides: texts such as ``training.epochs=3``: a dotted key and a YAML value.

    Raises:
        UserError: the file cannot be read or is not YAML, a key is unknown, a value has the wrong
            type, or values do not fit together.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        remedy = "`coda recipes` lists the ready-made ones"
        raise UserError(f"recipe {path}: cannot be read: {error.strerror}; {remedy}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: is not UTF-8 text") from error
    tree = parse.parse(text, f"recipe {path}")
    if not isinstance(tree, dict):
        raise UserError(
            f"recipe {path}: must be a mapping of keys to values, found {type(tree).__name__}"
        )
    training = tree.get("training")
    stated = training.get("epochs") if isinstance(training, dict) else None
    for override in overrides:
        parse.override(tree, override)
    changed = {override.partition("=")[0] for override in overrides}
    recipe = parse.build(Recipe, tree, "", f"recipe {path}")
    if "training.epochs" in changed and not changed & {"training", "training.warmup_epochs"}:
        recipe = _with_fitting_warmup(recipe, stated, path)
    check(recipe, f"recipe {path}")
    return recipe


def from_dict(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Build and check a recipe from plain data, such as ``Recipe.to_dict`` returns.

    Raises:
        UserError: as in ``load``; the message begins with ``where``.
    """
    recipe = parse.build(Recipe, tree, "", where)
    check(recipe, where)
    return recipe


def load_stored(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe that a run folder or an export was made with, overridden as in ``load``.

    Raises:
        UserError: the folder holds no recipe, or it cannot be read.
    """
    stored = RunFolder(folder).recipe
    if not stored.is_file():
        raise UserError(
            f"{folder}: holds no {stored.name}, so it is neither a run nor an export; "
            "`coda train RECIPE` makes a run"
        )
    return load(stored, overrides)


def _with_fitting_warmup(recipe: Recipe, stated: object, path: str | Path) -> Recipe:
    """Shorten a warm-up that would fill all epochs of ``recipe``.

    It keeps its share of the epochs that are ``stated`` in the file at ``path``.
    """
    training = recipe.training
    if not (
        isinstance(stated, int)
        and 0 < training.epochs < stated
        and training.warmup_epochs >= training.epochs
    ):
        return recipe
    warmup = float(f"{training.warmup_epochs / stated * training.epochs:.2g}")
    log.warning(
        "training.warmup_epochs %g does not fit %d epoch%s: %g is used, the same share as in %s; "
        "say training.warmup_epochs=... for another",
        training.warmup_epochs,
        training.epochs,
        "s" if training.epochs > 1 else "",
        warmup,
        path,
    )
    return dataclasses.replace(recipe, training=dataclasses.replace(training, warmup_epochs=warmup))
