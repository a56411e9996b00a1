"""The training loop: update, log, save, evaluate, until the recipe's last update.

Killed at any moment and started again, it ends with the same weights and metrics.
"""

import logging
import math
import time
from collections.abc import Iterator

import torch
from tqdm import tqdm

from pipeline.data.epoch_loader import Batch
from pipeline.distributed import run_collectively, sum_across_ranks
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluate
from pipeline.recipe.schedules import learning_rate
from pipeline.recipe.schema import Recipe
from pipeline.reports.run import draw_contributions
from pipeline.tracking import Tracker
from pipeline.training.failures import Watchdog
from pipeline.training.setup import Setup
from pipeline.training.stop import Stop

log = logging.getLogger(__name__)

SELECTED_BY = "val/top1"
"""The checkpoint with the highest value is kept."""


class Trainer:
    """Trains a run that has been set up and taken over, from ``updates`` on.

    Args:
        setup: loaders, learner and checkpoints.
        updates: optimiser updates done so far.
        tracker: takes what is logged; it drops what it knows already.
        stop: whether the process was asked to stop.
        watchdog: is told of every update.
    """

    def __init__(
        self, setup: Setup, updates: int, tracker: Tracker, stop: Stop, watchdog: Watchdog
    ) -> None:
        self.updates = updates
        self._setup, self._tracker, self._stop, self._watchdog = setup, tracker, stop, watchdog
        self._recipe: Recipe = setup.recipe
        self._main = setup.world.is_main
        self._device_hours = _DeviceHours(tracker, setup.world.size)

    def train(self) -> None:
        """Train all epochs that are left; a checkpoint and an evaluation follow each.

        A run that stopped after the checkpoint of an epoch begins with its evaluation.

        Raises:
            UserError: the loss is not finite, or another start has taken over the run.
            OSError: the disk is full or failing.
        """
        setup = self._setup
        self._leave_if_asked()
        with tqdm(
            total=setup.total_updates,
            initial=self.updates,
            unit="update",
            desc=self._recipe.name,
            disable=not self._main,
        ) as bar:
            while True:
                epoch, done = divmod(self.updates, setup.updates_per_epoch)
                if not done:
                    self._evaluate(epoch)
                if self.updates == setup.total_updates:
                    return
                begin = done * setup.learner.accumulation
                with setup.batches.epoch(epoch, begin) as batches:
                    self._train_epoch(batches, bar)
                setup.learner.average_buffers()
                self._save()

    def _train_epoch(self, batches: Iterator[Batch], bar: tqdm) -> None:
        """Train to the end of the epoch; save between its updates where the recipe asks for it."""
        self._setup.learner.engine.train()
        every_log = self._recipe.tracking.log_every_updates
        every_save = self._recipe.training.checkpoint_every_updates
        clock, clocked_updates = time.monotonic(), self.updates
        while True:
            loss = self._setup.learner.update(batches, self.updates, self._rate(self.updates))
            self.updates += 1
            self._watchdog.beat()
            bar.update()
            save = every_save is not None and self.updates % every_save == 0
            if self.updates % every_log == 0:
                # The one point where the host waits for the device; whether to stop costs no
                # reduction of its own.
                sums = sum_across_ranks(torch.stack([loss, self._stop.flag()]))
                mean_loss, asked = sums.tolist()
                now = time.monotonic()
                images = (self.updates - clocked_updates) * self._recipe.training.global_batch_size
                self._log(mean_loss, images / (now - clock), bar)
                clock, clocked_updates = now, self.updates
                save = save or asked > 0
            if self.updates % self._setup.updates_per_epoch == 0:
                return
            if save:
                self._save()

    def _rate(self, update: int) -> float:
        return learning_rate(update, self._setup.updates_per_epoch, self._recipe.training)

    def _log(self, loss: float, images_per_second: float, bar: tqdm) -> None:
        """Log the last update; stop with an error if its loss is not finite."""
        values = {
            "train/loss": loss,
            "train/learning_rate": self._rate(self.updates - 1),
            "speed/images_per_second": images_per_second,
            "speed/device_hours": self._device_hours.so_far(),
        }
        if self._main:
            self._setup.lease.check()
        self._tracker.metrics(values, step=self.updates * self._recipe.training.global_batch_size)
        if not math.isfinite(loss):
            raise UserError(
                f"{self._setup.folder}: the loss is {loss} at update {self.updates}; lower "
                "training.learning_rate, or set training.clip_grad_norm or "
                "training.warmup_epochs, and train under a new name"
            )
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def _evaluate(self, epoch: int) -> None:
        """Log metrics and a sheet of contributions after ``epoch`` epochs.

        Before the first epoch it is the sheet alone: MLflow shows the pictures of step 0 first.
        After the last the export is evaluated, which is not done here.
        """
        setup, settings = self._setup, self._recipe.evaluation
        if epoch % settings.every_epochs or epoch == self._recipe.training.epochs:
            return
        model = setup.learner.result
        values: dict[str, float] = {}
        if epoch:
            with self._stop.at_once():
                values = evaluate(
                    model, self._recipe, setup.validation, setup.world, settings.metrics
                ).values
        self._tracker.metrics(values, step=epoch)
        if self._main:
            sheet = setup.folder.epoch_sheet(epoch)
            draw_contributions(model, setup.world, setup.validation, sheet)
            self._tracker.image(sheet, sheet.stem, step=epoch)
        if SELECTED_BY in values:
            setup.checkpoints.mark_best(self.updates, values[SELECTED_BY])
        self._watchdog.beat()

    def _save(self) -> None:
        # The journal is never behind a checkpoint.
        run_collectively(self._tracker.sync_to_disk)
        self._setup.checkpoints.save(self._setup.learner, self.updates)
        self._watchdog.beat()
        self._leave_if_asked()

    def _leave_if_asked(self) -> None:
        """Exit if any process was asked to stop. Called only where everything is saved."""
        if self._stop.agreed():
            total = self._setup.total_updates
            log.info("asked to stop: saved at update %d of %d", self.updates, total)
            self._stop.leave()


class _DeviceHours:
    """Hours x processes of a run, over all its starts, as far as they were logged."""

    def __init__(self, tracker: Tracker, processes: int) -> None:
        history = tracker.history().items()
        logged = [value for (name, _), value in history if name == "speed/device_hours"]
        self._before, self._processes = max(logged, default=0.0), processes
        self._began = time.monotonic()

    def so_far(self) -> float:
        """Hours until now."""
        return self._before + self._processes * (time.monotonic() - self._began) / 3600
