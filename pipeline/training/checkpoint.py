"""Checkpoints that are complete or absent, and whose loading runs no code.

A checkpoint is a folder ``update-<n>`` with ``model.pt`` (the whole model, the average of its
weights if there is one, class names, progress), one ``rank-<r>.pt`` a process (random state, batch
norm statistics, and optimiser state: whole on rank 0, or this rank's shard with ZeRO 1 and 2) and
``manifest.json`` (size and SHA-256 of every file). It is written under a temporary name, synced to
disk and renamed. DeepSpeed's own checkpoints overwrite in place, name the latest before all ranks
have written, and are loaded by unpickling.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from pipeline import __version__
from pipeline.distributed import World, average_buffers, gather_across_ranks, run_collectively
from pipeline.errors import UserError
from pipeline.files import sha256_of, sync, write_atomically
from pipeline.slurm import report_event
from pipeline.training.checkpoint_files import load_state, newest_valid, published, store_state
from pipeline.training.learner import Learner
from pipeline.training.lease import Lease

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# Newest checkpoints that stay on disk, beside the best.
KEPT_CHECKPOINTS = 2
# Number of updates of the best checkpoint, and its value.
BEST_NAME = "best.json"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they live; made if missing.
        world: this process among all.
        classes: names of the model's classes, stored for exports.
        lease: who may write them.
    """

    def __init__(self, folder: Path, world: World, classes: Sequence[str], lease: Lease):
        self.folder, self.world, self.classes, self.lease = folder, world, list(classes), lease

    def save(self, learner: Learner, updates: int) -> None:
        """Write the state of ``learner`` after ``updates`` updates, and leave it as it is.

        Every process must call it. The model is written with the mean of the processes' batch norm
        statistics; each keeps its own for going on.

        Raises:
            OSError: on every process, if one cannot write. The checkpoints before this one stay.
            UserError: another start of the run has taken over.
        """
        began = time.monotonic()
        temporary = self.folder / f".saving-{updates}-{self.world.incarnation}"
        modules = _modules(learner)
        own = {
            key: {
                name: buffer.clone()
                for name, buffer in module.named_buffers()
                if buffer.is_floating_point()
            }
            for key, module in modules.items()
        }
        for module in modules.values():
            average_buffers(module)
        try:
            run_collectively(lambda: self._make(temporary), main_only=True)
            run_collectively(lambda: self._write(learner, temporary, updates, own))
            run_collectively(lambda: self._publish(temporary, updates), main_only=True)
        except OSError as error:
            newest = next((path.name for path in published(self.folder)), None)
            kept = f"{newest} stays the newest" if newest else "there is none yet"
            reason = f"cannot be written: {error.strerror or error}; {kept}"
            raise OSError(
                error.errno, reason, f"checkpoint {self.folder}/update-{updates}"
            ) from error
        finally:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
        for key, module in modules.items():
            module.load_state_dict(own[key], strict=False)
        if self.world.is_main:
            final = self.folder / f"update-{updates}"
            size = sum(file.stat().st_size for file in final.iterdir())
            seconds = time.monotonic() - began
            log.info("saved %s: %.1f MB in %.2f s", final, size / 1e6, seconds)
            report_event("saved", updates)

    def mark_best(self, updates: int, value: float) -> None:
        """Keep the checkpoint after ``updates``, just written, if no other has a higher ``value``.

        Every process must call it.
        """

        def mark() -> None:
            path = self.folder / BEST_NAME
            if not path.exists() or value > json.loads(path.read_text())["value"]:
                write_atomically(path, json.dumps({"updates": updates, "value": value}).encode())

        run_collectively(mark, main_only=True)

    def newest(self) -> Path | None:
        """Find the newest valid checkpoint; None if there is none.

        Every process must call it; all get the same answer.
        """
        found = newest_valid(self.folder) if self.world.is_main else None
        path: Path | None = gather_across_ranks(found)[0]
        return path

    def remove_unfinished(self) -> None:
        """Remove what saves have left that were cut off."""
        for leftover in self.folder.glob(".saving-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def load(self, learner: Learner, path: Path) -> int:
        """Restore the checkpoint ``path`` into ``learner``. Every process must call it.

        Returns:
            its number of updates.

        Raises:
            UserError: it belongs to another model, or was sharded over another number of processes.
        """
        engine, modules = learner.engine, _modules(learner)
        state = load_state(path / "model.pt")
        if state["shards"] != self._shards(engine):
            raise UserError(
                f"checkpoint {path}: its optimiser is in {state['shards'] or 'no'} shards, "
                f"this run needs {self._shards(engine) or 'none'}: start it with as many processes "
                "and the training.zero_stage it was saved with, or train with zero_stage 0"
            )
        try:
            for key, module in modules.items():
                module.load_state_dict(state[key])
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            raise UserError(
                f"checkpoint {path}: its tensors do not fit this model; give the run another name"
            ) from error
        own = path / f"rank-{self.world.rank}.pt"
        if len(list(path.glob("rank-*.pt"))) == self.world.size:
            private = load_state(own)
            _set_random_state(private["random"], self.world)
            for key, module in modules.items():
                module.load_state_dict(private["buffers"][key], strict=False)
        _optimizer(engine).load_state_dict(
            load_state(own if _sharded(engine) else path / "rank-0.pt")["optimizer"]
        )
        if _sharded(engine):
            engine.optimizer.refresh_fp32_params()
        if self.world.is_main:
            report_event("resumed", state["updates"])
        return int(state["updates"])

    def _shards(self, engine: "DeepSpeedEngine") -> int:
        return self.world.size if _sharded(engine) else 0

    def _make(self, temporary: Path) -> None:
        self.lease.check()
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def _write(
        self,
        learner: Learner,
        temporary: Path,
        updates: int,
        buffers: dict[str, dict[str, torch.Tensor]],
    ) -> None:
        engine = learner.engine
        if self.world.is_main:
            weights = {key: module.state_dict() for key, module in _modules(learner).items()}
            state = {
                **weights,
                "classes": self.classes,
                "updates": updates,
                "shards": self._shards(engine),
                "coda_pipeline": __version__,
            }
            store_state(state, temporary / "model.pt")
        optimizer = (
            _optimizer(engine).state_dict() if self.world.is_main or _sharded(engine) else None
        )
        private = {"random": _random_state(self.world), "buffers": buffers, "optimizer": optimizer}
        store_state(private, temporary / f"rank-{self.world.rank}.pt")

    def _publish(self, temporary: Path, updates: int) -> None:
        files = {
            file.name: [file.stat().st_size, sha256_of(file)]
            for file in sorted(temporary.iterdir())
        }
        write_atomically(temporary / "manifest.json", json.dumps(files, indent=1).encode())
        sync(temporary)
        final = self.folder / f"update-{updates}"
        self.lease.check()
        # A broken one, or the same state saved before a restart.
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        sync(self.folder)
        best = self.folder / BEST_NAME
        spared = json.loads(best.read_text())["updates"] if best.exists() else None
        for old in published(self.folder)[KEPT_CHECKPOINTS:]:
            if old.name != f"update-{spared}":
                shutil.rmtree(old, ignore_errors=True)


def _modules(learner: Learner) -> dict[str, nn.Module]:
    """What has weights and buffers, by its name in ``model.pt``."""
    modules = {"model": learner.engine.module}
    return modules if learner.average is None else {**modules, "average": learner.average}


def _sharded(engine: "DeepSpeedEngine") -> bool:
    return bool(engine.zero_optimization_stage() > 0)


def _optimizer(engine: "DeepSpeedEngine") -> torch.optim.Optimizer:
    """Torch's own optimiser, which may be inside ZeRO's wrapper.

    Its parameters are fp32, so the model holds the weights.
    """
    optimizer: torch.optim.Optimizer = (
        engine.optimizer.optimizer if _sharded(engine) else engine.optimizer
    )
    return optimizer


def _random_state(world: World) -> list[torch.Tensor]:
    """States of torch's generators: the processor's, and on a GPU also the device's."""
    states = [torch.get_rng_state()]
    if world.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(world.device))
    return states


def _set_random_state(states: list[torch.Tensor], world: World) -> None:
    torch.set_rng_state(states[0])
    if world.device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], world.device)
