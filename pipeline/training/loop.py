"""Training: recipe -> run folder. Killed at any moment and started again, it ends with the same
weights and metrics.
"""

import hashlib
import logging
import math
import os
import time
from collections.abc import Iterator

import torch
import yaml
from timm.utils import ModelEmaV3
from tqdm import tqdm

from pipeline.data import manifest
from pipeline.data.epoch_loader import Batch, unit_range
from pipeline.data.loaders import eval_loader, train_loader
from pipeline.data.memory import require_memory
from pipeline.data.prepare import prepare
from pipeline.distributed import (
    World,
    average_buffers,
    barrier,
    gather_across_ranks,
    job_tags,
    sum_across_ranks,
    together,
)
from pipeline.errors import UserError, report
from pipeline.evaluation.evaluate import evaluate
from pipeline.export import FOLDER, export
from pipeline.files import write_atomically
from pipeline.models.create import build_model
from pipeline.recipe.load import load_stored
from pipeline.recipe.schema import STORED, Recipe
from pipeline.reports.run import PICTURES, SHEET, conclude, draw_contributions, track
from pipeline.tracking import Tracker, open_tracker
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.engine import build, load_deepspeed
from pipeline.training.failures import Watchdog, first_error
from pipeline.training.lease import Lease
from pipeline.training.losses import LOSSES, soft_targets
from pipeline.training.optim import build_optimizer, learning_rate
from pipeline.training.penalty import DynamicWeightPenalty
from pipeline.training.stop import Stop

log = logging.getLogger(__name__)

# the checkpoint with the highest one is kept
SELECTED_BY = "val/top1"


def train(recipe: Recipe, world: World) -> None:
    """Train to the recipe's last update, from the newest checkpoint of the run folder if there is
    one.

    Leaves in ``recipe.folder``: recipe.yaml, checkpoints, the journal of metrics, and, made from
    the final weights, the export, its evaluation and pictures.

    Raises:
        UserError: the recipe does not fit the data, the number of processes, or the run that is in
            the folder already.
    """
    load_deepspeed()
    with Stop(world) as stop:
        with stop.at_once():
            if not gather_across_ranks((recipe.data.folder / manifest.NAME).exists())[0]:
                # files that are there and damaged are for `coda prepare` to replace, not for a
                # training
                prepare(recipe)
        _refuse_another_run(recipe)
        with first_error(recipe.folder, world, stop):
            run = Run(recipe, world)
            # every process has checked data, recipe and folder before one writes
            barrier()
            with Watchdog(recipe.folder, world) as watchdog:
                run.start()
                stored = yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode()
                together(lambda: write_atomically(recipe.folder / STORED, stored), main_only=True)
                with open_tracker(
                    recipe, recipe.folder, world, tags=_circumstances(recipe)
                ) as tracker:
                    _note_data(recipe, tracker)
                    run.finish(tracker, stop, watchdog)
                    with stop.at_once():
                        exported = recipe.folder / FOLDER
                        together(
                            lambda: export(run.result, recipe, run.batches.classes, exported),
                            main_only=True,
                        )
                        track(
                            tracker, recipe, recipe.folder, conclude(recipe.folder, recipe, world)
                        )
                        tracker.model(exported)
        if world.is_main:
            report("finished")


def _circumstances(recipe: Recipe) -> dict[str, str]:
    """Tags: the job, and a hash of the manifest, which itself has the hashes of the data's files."""
    description = (recipe.data.folder / manifest.NAME).read_bytes()
    return {**job_tags(os.environ), "data/manifest_sha256": hashlib.sha256(description).hexdigest()}


def _note_data(recipe: Recipe, tracker: Tracker) -> None:
    described = manifest.open_manifest(recipe.data.folder)
    for context, split in (("training", "train"), ("validation", "val")):
        file = described.splits[split]
        profile = {"samples": file.samples, "classes": len(described.classes)}
        tracker.dataset(
            context,
            f"{recipe.data.source}-{split}",
            recipe.data.folder / file.file,
            file.tables_sha256[:16],
            **profile,
        )


def _refuse_another_run(recipe: Recipe) -> None:
    if not (recipe.folder / STORED).exists():
        return
    stored, wanted = load_stored(recipe.folder).identity(), recipe.identity()
    for key in sorted({*stored, *wanted}):
        if stored.get(key) != wanted.get(key):
            raise UserError(
                f"run {recipe.folder}: was started with {key} = {stored.get(key)!r}, the recipe says {wanted.get(key)!r}; "
                "give the run another name, or set it back"
            )


class Run:
    """State of one training: engine, loaders, and the number of updates done. Made without writing
    anything.

    Raises:
        UserError: the recipe does not fit the data or the number of processes, or names no model.
    """

    def __init__(self, recipe: Recipe, world: World):
        self.recipe, self.world = recipe, world
        micro_batch, self.accumulation = recipe.micro_batch(world.size)
        require_memory(recipe, world, micro_batch)
        self.batches = train_loader(recipe, world, micro_batch)
        self.validation = eval_loader(recipe, world, recipe.evaluation.batch_size)
        self.updates_per_epoch = self.batches.samples // recipe.training.global_batch_size
        self.lease = Lease(recipe.folder, world.incarnation)
        self.checkpoints = Checkpoints(
            recipe.folder / "checkpoints", world, self.batches.classes, self.lease
        )
        self.resumed_from = self.checkpoints.newest()
        # initialisation, and what a model draws itself (dropout)
        torch.manual_seed(recipe.seed)
        self.model = build_model(
            recipe.model, len(self.batches.classes), fresh=self.resumed_from is None
        ).to(world.device)
        decay = recipe.training.weight_average
        self.averaging = ModelEmaV3(self.model, decay, use_warmup=True) if decay else None
        self.average = self.averaging.module if self.averaging else None
        self.loss = LOSSES[recipe.training.loss]
        strength = recipe.training.weight_penalty
        self.penalty = DynamicWeightPenalty(self.model, strength, recipe.seed) if strength else None
        self.updates = 0

    def start(self) -> None:
        """Take over the run folder and continue from the checkpoint that was its newest."""
        together(self.lease.take, main_only=True)
        self.engine = build(
            self.recipe, self.model, build_optimizer(self.model, self.recipe.training), self.world
        )
        self.updates = self.checkpoints.load(self.engine, self.resumed_from, self.average)
        if self.updates and self.world.is_main:
            log.info(
                "resumed %s at update %d of %d",
                self.recipe.folder,
                self.updates,
                self.total_updates,
            )

    @property
    def result(self) -> torch.nn.Module:
        """What is evaluated and exported: the average of the weights where the recipe asks for one,
        else the weights.
        """
        return self.engine.module if self.average is None else self.average

    @property
    def total_updates(self) -> int:
        return self.recipe.training.epochs * self.updates_per_epoch

    def finish(self, tracker: Tracker, stop: Stop, watchdog: Watchdog) -> None:
        """All epochs that are left, each followed by a checkpoint and its evaluation; ``tracker``
        is told of all of it.

        A run that stopped after the checkpoint of an epoch begins with its evaluation; the tracker
        drops what it knows already.
        """
        self.tracker, self.stop, self.watchdog = tracker, stop, watchdog
        self.clock = time.monotonic()
        self.device_hours = max(
            (
                value
                for (name, _), value in tracker.history().items()
                if name == "speed/device_hours"
            ),
            default=0.0,
        )
        hidden = not self.world.is_main
        self._stop_if_asked()
        with tqdm(
            total=self.total_updates,
            initial=self.updates,
            unit="update",
            desc=self.recipe.name,
            disable=hidden,
        ) as bar:
            while True:
                epoch, done = divmod(self.updates, self.updates_per_epoch)
                if not done:
                    self._evaluate(epoch)
                if self.updates == self.total_updates:
                    return
                with self.batches.epoch(epoch, done * self.accumulation) as batches:
                    self._train_epoch(batches, bar)
                average_buffers(self.engine.module)
                if self.average is not None:
                    average_buffers(self.average)
                self._save()

    def _train_epoch(self, batches: Iterator[Batch], bar: tqdm) -> None:
        self.engine.train()
        every_log, every_save = (
            self.recipe.tracking.log_every_updates,
            self.recipe.training.checkpoint_every_updates,
        )
        clock, clocked_updates = time.monotonic(), self.updates
        while True:
            loss = self._update(batches)
            self.updates += 1
            self.watchdog.beat()
            bar.update()
            save = every_save is not None and self.updates % every_save == 0
            if self.updates % every_log == 0:
                # The one point where the host waits for the device; whether to stop costs no
                # reduction of its own.
                mean_loss, asked = sum_across_ranks(torch.stack([loss, self.stop.flag()])).tolist()
                now = time.monotonic()
                speed = (
                    (self.updates - clocked_updates)
                    * self.recipe.training.global_batch_size
                    / (now - clock)
                )
                clock, clocked_updates = now, self.updates
                self._log(mean_loss, speed, bar)
                save = save or asked > 0
            if self.updates % self.updates_per_epoch == 0:
                return
            if save:
                self._save()

    def _update(self, batches: Iterator[Batch]) -> torch.Tensor:
        """One optimiser update; returns this process's part of the mean loss of the global batch."""
        rate = learning_rate(self.updates, self.updates_per_epoch, self.recipe.training)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.world.device)
        for _ in range(self.accumulation):
            batch = next(batches)
            logits = self.engine(unit_range(batch.images, self.world.device)).float()
            labels = batch.labels.to(self.world.device)
            classes = labels if batch.targets is None else batch.targets.to(self.world.device)
            loss = self.loss(
                logits, soft_targets(classes, logits.shape[1], self.recipe.training.label_smoothing)
            )
            if self.penalty:
                loss = loss + self.penalty(labels, self.updates)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / (self.accumulation * self.world.size)
        if self.averaging:
            self.averaging.update(self.engine.module, step=self.updates + 1)
        return total

    def _log(self, loss: float, speed: float, bar: tqdm) -> None:
        rate = learning_rate(self.updates - 1, self.updates_per_epoch, self.recipe.training)
        now = time.monotonic()
        self.device_hours += self.world.size * (now - self.clock) / 3600
        self.clock = now
        values = {
            "train/loss": loss,
            "train/learning_rate": rate,
            "speed/images_per_second": speed,
            "speed/device_hours": self.device_hours,
        }
        if self.world.is_main:
            self.lease.check()
        self.tracker.metrics(values, step=self.updates * self.recipe.training.global_batch_size)
        if not math.isfinite(loss):
            raise UserError(
                f"{self.recipe.folder}: the loss is {loss} at update {self.updates}; "
                "lower training.learning_rate, or set training.clip_grad_norm or training.warmup_epochs, and train under a new name"
            )
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def _evaluate(self, epoch: int) -> None:
        """Metrics and a sheet of contributions. Before the first epoch the sheet alone: MLflow
        shows the pictures of step 0 first.
        """
        evaluation = self.recipe.evaluation
        # the last one is done on the export
        if epoch % evaluation.every_epochs or epoch == self.recipe.training.epochs:
            return
        values: dict[str, float] = {}
        if epoch:
            with self.stop.at_once():
                values = evaluate(
                    self.result, self.recipe, self.validation, self.world, evaluation.metrics
                ).values
        self.tracker.metrics(values, step=epoch)
        if self.world.is_main:
            sheet = self.recipe.folder / PICTURES / f"epoch-{epoch:04}" / SHEET
            draw_contributions(self.result, self.world, self.validation, sheet)
            self.tracker.image(sheet, sheet.stem, step=epoch)
        if SELECTED_BY in values:
            self.checkpoints.mark_best(self.updates, values[SELECTED_BY])
        self.watchdog.beat()

    def _save(self) -> None:
        # the journal is never behind a checkpoint
        together(self.tracker.sync_to_disk)
        self.checkpoints.save(self.engine, self.updates, self.average)
        self.watchdog.beat()
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Called only where everything is saved."""
        if self.stop.agreed():
            if self.world.is_main:
                log.info(
                    "asked to stop: saved at update %d of %d", self.updates, self.total_updates
                )
            self.stop.leave()
