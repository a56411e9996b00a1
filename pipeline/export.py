"""Exports: folders with a trained model that timm loads by itself.

After ``import pipeline``, ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads one. It
holds model.safetensors (fp32 weights), config.json (the architecture and its arguments) and
recipe.yaml (the recipe of the run). Loading needs neither DeepSpeed nor a checkpoint.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import yaml
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from pipeline import __version__
from pipeline.errors import UserError
from pipeline.recipe.schema import Recipe
from pipeline.run_folder import EXPORT_CONFIG, RunFolder


def export(model: nn.Module, recipe: Recipe, classes: Sequence[str], folder: Path) -> None:
    """Write ``model`` to ``folder``; a complete export replaces an earlier one.

    Args:
        model: the network, with its weights on any device.
        recipe: the recipe of the run.
        classes: names of the classes, in the order of the logits.
        folder: the export's folder.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    replaced = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    size = recipe.data.evaluated_size
    config = {
        "label_names": list(classes),
        "pretrained_cfg": {"input_size": [3, size, size]},
        "coda_pipeline": __version__,
    }
    save_for_hf(
        model,
        str(temporary),
        model_config=config,
        model_args=dict(recipe.model.args),
        safe_serialization=True,
    )
    RunFolder(temporary).recipe.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(temporary, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def class_names(folder: Path) -> list[str]:
    """Read the names of the exported model's classes, in the order of its logits.

    Raises:
        UserError: the export is damaged.
    """
    return list(_description(folder)["label_names"])


def load_export(folder: Path) -> nn.Module:
    """Load the exported model, in evaluation mode.

    Raises:
        UserError: the export is damaged.
    """
    _description(folder)
    try:
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except (SafetensorError, RuntimeError) as error:
        known = ("Error(s) in loading state_dict", "No suitable checkpoints")
        if isinstance(error, RuntimeError) and not str(error).startswith(known):
            raise
        raise _damaged(folder, " ".join(str(error).split())) from error
    return model.eval()


def _description(folder: Path) -> dict[str, Any]:
    """Read config.json, and check what timm takes on trust.

    Raises:
        UserError: the export is damaged.
    """
    try:
        tree: dict[str, Any] = json.loads((folder / EXPORT_CONFIG).read_text())
    except (FileNotFoundError, ValueError) as error:
        raise _damaged(folder, f"config.json: {error}") from error
    keys = {"architecture": str, "num_classes": int, "label_names": list, "pretrained_cfg": dict}
    for key, kind in keys.items():
        if not isinstance(tree, dict) or not isinstance(tree.get(key), kind):
            raise _damaged(folder, f"config.json says no {key}")
    if not timm.is_model(tree["architecture"]):
        raise _damaged(
            folder, f"config.json names {tree['architecture']!r}, which timm does not know"
        )
    if len(tree["label_names"]) != tree["num_classes"]:
        raise _damaged(
            folder, f"config.json names {len(tree['label_names'])} of {tree['num_classes']} classes"
        )
    if not isinstance(tree.get("model_args", {}), dict):
        raise _damaged(folder, "config.json: model_args must be a mapping")
    return tree


def _damaged(folder: Path, reason: str) -> UserError:
    return UserError(
        f"export {folder}: cannot be loaded: {reason}; `coda export RUN` writes it anew"
    )
