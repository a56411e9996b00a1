"""Checkpoints that are complete or absent, and whose loading runs no code.

A checkpoint is a folder ``update-<n>`` with ``model.pt`` (the whole model, class names, progress), one ``rank-<r>.pt`` a
process (random state, and optimiser state: whole on rank 0, or this rank's shard with ZeRO 1 and 2) and ``manifest.json`` (size
and SHA-256 of every file). It is written under a temporary name, synced to disk and renamed. DeepSpeed's own checkpoints
overwrite in place, name the latest before all ranks have written, and are loaded by unpickling.
"""

import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.distributed import World, barrier, gather_across_ranks
from pipeline.errors import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

KEEP = 2  # newest checkpoints that stay on disk


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they live; made if missing.
        world: this process among all.
        classes: names of the model's classes, stored for exports.
    """

    def __init__(self, folder: Path, world: World, classes: Sequence[str]):
        self.folder, self.world, self.classes = folder, world, list(classes)

    def save(self, engine: "DeepSpeedEngine", updates: int) -> None:
        """Write the state after ``updates`` optimiser updates. Every process must call it."""
        temporary = self.folder / f".saving-{updates}"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        if self.world.is_main:
            state = {"model": engine.module.state_dict(), "classes": self.classes, "updates": updates, "shards": self._shards(engine)}
            torch.save(state, temporary / "model.pt")
        optimizer = _optimizer(engine).state_dict() if self.world.is_main or _sharded(engine) else None
        torch.save({"random": torch.get_rng_state(), "optimizer": optimizer}, temporary / f"rank-{self.world.rank}.pt")
        barrier()
        if self.world.is_main:
            self._publish(temporary, updates)
        barrier()

    def load_newest(self, engine: "DeepSpeedEngine") -> int:
        """Restore the newest valid checkpoint and return its number of updates; 0 and nothing restored if there is none.

        Raises:
            UserError: it belongs to another model, or was sharded over another number of processes.
        """
        if self.world.is_main:
            for leftover in self.folder.glob(".saving-*"):
                shutil.rmtree(leftover)
        path = gather_across_ranks(_newest_valid(self.folder) if self.world.is_main else None)[0]
        if path is None:
            return 0
        state = _load(path / "model.pt")
        if state["shards"] != self._shards(engine):
            raise UserError(
                f"checkpoint {path}: its optimiser is in {state['shards'] or 'no'} shards, "
                f"this run needs {self._shards(engine) or 'none'}: start it with as many processes and the training.zero_stage "
                "it was saved with, or train with zero_stage 0"
            )
        try:
            engine.module.load_state_dict(state["model"])
        except RuntimeError as error:
            raise UserError(f"checkpoint {path}: its tensors do not fit this model; give the run another name") from error
        own = path / f"rank-{self.world.rank}.pt"
        if own.exists():
            torch.set_rng_state(_load(own)["random"])
        _optimizer(engine).load_state_dict(_load(own if _sharded(engine) else path / "rank-0.pt")["optimizer"])
        if _sharded(engine):
            engine.optimizer.refresh_fp32_params()
        return state["updates"]

    def _shards(self, engine: "DeepSpeedEngine") -> int:
        return self.world.size if _sharded(engine) else 0

    def _publish(self, temporary: Path, updates: int) -> None:
        files = {file.name: [file.stat().st_size, _sha256(file)] for file in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(files, indent=1))
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        final = self.folder / f"update-{updates}"
        shutil.rmtree(final, ignore_errors=True)  # a broken one, or the same state saved before a restart
        os.rename(temporary, final)
        _sync(self.folder)
        for old in _published(self.folder)[KEEP:]:
            shutil.rmtree(old)


def newest_model(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights and class names of the newest valid checkpoint in ``folder``.

    Raises:
        UserError: there is none.
    """
    path = _newest_valid(folder)
    if path is None:
        raise UserError(f"{folder}: holds no valid checkpoint; `coda train` writes one at the end of every epoch")
    state = _load(path / "model.pt")
    return state["model"], state["classes"]


def _published(folder: Path) -> list[Path]:
    """Checkpoints under their final names, newest first."""
    found = [path for path in folder.glob("update-*") if path.name.removeprefix("update-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("update-")), reverse=True)


def _newest_valid(folder: Path) -> Path | None:
    for path in _published(folder):
        if _valid(path):
            return path
        print(f"checkpoint {path} is damaged and skipped", file=sys.stderr)
    return None


def _sharded(engine: "DeepSpeedEngine") -> bool:
    return engine.zero_optimization_stage() > 0


def _optimizer(engine: "DeepSpeedEngine") -> torch.optim.Optimizer:
    """torch's own optimiser, inside ZeRO's wrapper if there is one. Its parameters are fp32, so the model holds the weights."""
    return engine.optimizer.optimizer if _sharded(engine) else engine.optimizer


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path}: holds more than tensors and plain data, so it is not loaded") from error


def _valid(path: Path) -> bool:
    try:
        files = json.loads((path / "manifest.json").read_text())
        return all((path / name).stat().st_size == size and _sha256(path / name) == digest for name, (size, digest) in files.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
