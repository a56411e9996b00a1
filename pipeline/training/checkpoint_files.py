"""The files of checkpoints: how they are found, checked, written and read."""

import io
import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.files import sha256_of

log = logging.getLogger(__name__)


def newest_model(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Read the weights of the newest valid checkpoint in ``folder``, averaged if they were.

    Returns:
        weights by name, and the names of the classes.

    Raises:
        UserError: there is none.
    """
    path = newest_valid(folder)
    if path is None:
        raise UserError(
            f"{folder}: holds no valid checkpoint; "
            "`coda train` writes one at the end of every epoch"
        )
    state = load_state(path / "model.pt")
    return state.get("average", state["model"]), state["classes"]


def published(folder: Path) -> list[Path]:
    """Checkpoints under their final names, newest first."""
    found = [
        path for path in folder.glob("update-*") if path.name.removeprefix("update-").isdigit()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("update-")), reverse=True)


def newest_valid(folder: Path) -> Path | None:
    """Find the newest checkpoint that is whole; None if there is none."""
    for path in published(folder):
        if is_whole(path):
            return path
        log.warning("checkpoint %s is damaged and skipped", path)
    return None


def store_state(state: dict[str, Any], path: Path) -> None:
    """Write ``state``, tensors and plain data, and wait until it is on the disk."""
    # Given the file itself, torch reports a full disk as a failed internal check.
    content = io.BytesIO()
    torch.save(state, content)
    with path.open("wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def load_state(path: Path) -> dict[str, Any]:
    """Read what ``store_state`` wrote, without running code from the file.

    Raises:
        UserError: it holds more than tensors and plain data.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path}: holds more than tensors and plain data, so it is not loaded"
        ) from error


def is_whole(path: Path) -> bool:
    """Whether the checkpoint is whole. Raises OSError where it cannot be read."""
    try:
        files = json.loads((path / "manifest.json").read_text())
        return all(
            (path / name).stat().st_size == size and sha256_of(path / name) == digest
            for name, (size, digest) in files.items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
