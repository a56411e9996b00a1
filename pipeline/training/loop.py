"""Training: recipe -> run folder. Killed at any moment and started again, it ends with the same weights and metrics."""

import math
import time
from collections.abc import Iterator

import torch
import yaml
from tqdm import tqdm

from pipeline.data import manifest
from pipeline.data.load import Batch, eval_loader, train_loader, unit_range
from pipeline.data.write import prepare
from pipeline.distributed import World, average_buffers, barrier, gather_across_ranks, sum_across_ranks
from pipeline.errors import UserError
from pipeline.evaluate import evaluate
from pipeline.export import FOLDER, export
from pipeline.files import write_atomically
from pipeline.recipe import STORED, Recipe, load_stored
from pipeline.results import EVALUATION, conclude, pictures
from pipeline.tracking import Tracker, open_tracker
from pipeline.training import engine as engines
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.losses import LOSSES
from pipeline.training.model import build_model
from pipeline.training.optim import build_optimizer, learning_rate


def train(recipe: Recipe, world: World) -> None:
    """Train to the recipe's last update, from the newest checkpoint of the run folder if there is one.

    Leaves in ``recipe.folder``: recipe.yaml, checkpoints, the journal of metrics, and, made from the final weights, the export,
    its evaluation and pictures.

    Raises:
        UserError: the recipe does not fit the data, the number of processes, or the run that is in the folder already.
    """
    if not gather_across_ranks((recipe.data.folder / manifest.NAME).exists())[0]:
        prepare(recipe)  # files that are there and damaged are for `coda prepare` to replace, not for a training
    _refuse_another_run(recipe)
    run = Run(recipe, world)
    run.resume()
    barrier()  # every process has read the folder before one writes
    if world.is_main:
        write_atomically(recipe.folder / STORED, yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode())
    with open_tracker(recipe, recipe.folder, world) as tracker:
        run.finish(tracker)
        if world.is_main:
            export(run.engine.module, recipe, run.batches.classes, recipe.folder / FOLDER)
        barrier()
        result = conclude(recipe.folder, recipe, world)
        tracker.metrics(result.values, step=recipe.training.epochs)
        for index, point in enumerate(result.curve):
            tracker.metrics({"interp/localisation_by_layer": point.localisation}, step=index)
        for path in [recipe.folder / EVALUATION, *pictures(recipe.folder)]:
            tracker.artifact(path)


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
    """State of one training: engine, loaders, and the number of updates done."""

    def __init__(self, recipe: Recipe, world: World):
        self.recipe, self.world, self.tracker = recipe, world, Tracker()
        micro_batch, self.accumulation = recipe.micro_batch(world.size)
        self.batches = train_loader(recipe, world, micro_batch)
        self.validation = eval_loader(recipe, world, recipe.evaluation.batch_size)
        self.updates_per_epoch = self.batches.samples // recipe.training.global_batch_size
        torch.manual_seed(recipe.seed)  # initialisation, and what a model draws itself (dropout)
        model = build_model(recipe.model, len(self.batches.classes))
        self.engine = engines.build(recipe, model, build_optimizer(model, recipe.training), world)
        self.loss = LOSSES[recipe.training.loss]
        self.checkpoints = Checkpoints(recipe.folder / "checkpoints", world, self.batches.classes)
        self.updates = 0

    def resume(self) -> None:
        """Continue from the newest valid checkpoint."""
        self.updates = self.checkpoints.load_newest(self.engine)
        if self.updates and self.world.is_main:
            print(f"resumed {self.recipe.folder} at update {self.updates} of {self.total_updates}")

    @property
    def total_updates(self) -> int:
        return self.recipe.training.epochs * self.updates_per_epoch

    def finish(self, tracker: Tracker) -> None:
        """All epochs that are left, each followed by its evaluation and a checkpoint; ``tracker`` is told of all of it."""
        self.tracker = tracker
        hidden = not self.world.is_main
        with tqdm(total=self.total_updates, initial=self.updates, unit="update", desc=self.recipe.name, disable=hidden) as bar:
            while self.updates < self.total_updates:
                epoch, done = divmod(self.updates, self.updates_per_epoch)
                with self.batches.epoch(epoch, done * self.accumulation) as batches:
                    self._train_epoch(batches, bar)
                average_buffers(self.engine.module)
                self._evaluate(epoch + 1)
                self._save()

    def _train_epoch(self, batches: Iterator[Batch], bar: tqdm) -> None:
        self.engine.train()
        every_log, every_save = self.recipe.tracking.log_every_updates, self.recipe.training.checkpoint_every_updates
        clock, clocked_updates = time.monotonic(), self.updates
        while True:
            loss = self._update(batches)
            self.updates += 1
            bar.update()
            if self.updates % every_log == 0:
                mean_loss = sum_across_ranks(loss).item()  # the one point where the host waits for the device
                now = time.monotonic()
                speed = (self.updates - clocked_updates) * self.recipe.training.global_batch_size / (now - clock)
                clock, clocked_updates = now, self.updates
                self._log(mean_loss, speed, bar)
            if self.updates % self.updates_per_epoch == 0:
                return
            if every_save and self.updates % every_save == 0:
                average_buffers(self.engine.module)
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
            loss = self.loss(logits, batch.labels.to(self.world.device))
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / (self.accumulation * self.world.size)
        return total

    def _log(self, loss: float, speed: float, bar: tqdm) -> None:
        rate = learning_rate(self.updates - 1, self.updates_per_epoch, self.recipe.training)
        values = {"train/loss": loss, "train/learning_rate": rate, "speed/images_per_second": speed}
        self.tracker.metrics(values, step=self.updates * self.recipe.training.global_batch_size)
        if not math.isfinite(loss):
            raise UserError(
                f"{self.recipe.folder}: the loss is {loss} at update {self.updates}; "
                "lower training.learning_rate, or set training.clip_grad_norm or training.warmup_epochs, and train under a new name"
            )
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def _evaluate(self, epoch: int) -> None:
        evaluation = self.recipe.evaluation
        if epoch % evaluation.every_epochs == 0 and epoch < self.recipe.training.epochs:  # the last one is done on the export
            result = evaluate(self.engine.module, self.recipe, self.validation, self.world, evaluation.metrics)
            self.tracker.metrics(result.values, step=epoch)

    def _save(self) -> None:
        self.tracker.sync_to_disk()  # the journal is never behind a checkpoint
        self.checkpoints.save(self.engine, self.updates)
