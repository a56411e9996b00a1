"""Reading a recipe: a YAML file, or plain data, and overrides -> frozen dataclasses, checked."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.recipe import parse
from pipeline.recipe.checks import check
from pipeline.recipe.schema import STORED, Recipe

log = logging.getLogger(__name__)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check the recipe at ``path``; each override is ``section.key=value`` with
    a YAML value.

    A warm-up that the overrides leave as it is in the file, and that fills all of the epochs that
    they ask for, is shortened to its share of the file's epochs, and a warning says so.

    Raises:
        UserError: unreadable file, bad YAML, unknown key, wrong type, or values that do not fit
            together.
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
    """Build and check a recipe from plain data, such as ``Recipe.to_dict`` returns. Raises
    UserError as ``load`` does.
    """
    recipe = parse.build(Recipe, tree, "", where)
    check(recipe, where)
    return recipe


def load_stored(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a run folder or an export was made with, overridden as in ``load``.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not (folder / STORED).is_file():
        raise UserError(
            f"{folder}: holds no {STORED}, so it is neither a run nor an export; `coda train RECIPE` makes a run"
        )
    return load(folder / STORED, overrides)


def _with_fitting_warmup(recipe: Recipe, stated: Any, path: str | Path) -> Recipe:
    """``recipe``; its warm-up at the share of the ``stated`` epochs of the file at ``path``, where
    it would fill all that are left.
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
