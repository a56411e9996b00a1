"""Runs, loaders and reports of a recipe, for tests."""

import json
import subprocess
import sys
from pathlib import Path

import yaml
from recipes_for_tests import small_recipe

from pipeline.data import loaders
from pipeline.data.prepared import open_prepared
from pipeline.recipe.schedules import learning_rate
from pipeline.recipe.schema import Recipe
from pipeline.reports.run import write_report
from pipeline.run_folder import RunFolder
from pipeline.training.setup import Setup


def train_loader(recipe, world, micro_batch):
    """Open the training loader of the recipe's prepared data."""
    return loaders.train_loader(recipe, open_prepared(recipe.data), world, micro_batch)


def eval_loader(recipe, world, batch_size, split="val"):
    """Open the loader of every image of a split of the recipe's prepared data."""
    return loaders.eval_loader(recipe, open_prepared(recipe.data), world, batch_size, split)


def report(folder: Path, recipe: Recipe, world):
    """Write the report of the run or export in ``folder``."""
    return write_report(RunFolder(folder), recipe, open_prepared(recipe.data), world)


def history(recipe):
    """Metrics in the run's journal, [(name, step, value)], in the order of writing."""
    lines = map(json.loads, recipe.folder.journal.read_text().splitlines())
    return [
        (line["key"], line["step"], line["value"]) for line in lines if line["kind"] == "metric"
    ]


def losses(recipe):
    """Losses in the run's journal, step -> loss."""
    return {step: value for name, step, value in history(recipe) if name == "train/loss"}


def start_command(recipe, folder, processes=1):
    """Start `coda train` with ``recipe`` as a new process, or as several under torchrun."""
    path = folder / f"{recipe.name}.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes)]
    with (folder / f"{recipe.name}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "pipeline", "train", str(path)],
            stdout=log,
            stderr=log,
        )


class StartedRun:
    """A run that proceeds update by update, without evaluation and tracking."""

    def __init__(self, recipe, world):
        self.recipe, self.world = recipe, world
        self.setup = Setup(recipe, open_prepared(recipe.data), recipe.folder, world)
        self.updates = self.setup.take_over()
        self.learner, self.checkpoints = self.setup.learner, self.setup.checkpoints
        self.engine, self.average = self.learner.engine, self.learner.average

    def update(self, count):
        """Do ``count`` updates, and return their losses."""
        losses, per_epoch = [], self.setup.updates_per_epoch
        self.engine.train()
        while len(losses) < count:
            epoch, done = divmod(self.updates, per_epoch)
            begin = done * self.learner.accumulation
            with self.setup.batches.epoch(epoch, begin) as batches:
                while len(losses) < count and self.updates < (epoch + 1) * per_epoch:
                    rate = learning_rate(self.updates, per_epoch, self.recipe.training)
                    losses.append(self.learner.update(batches, self.updates, rate))
                    self.updates += 1
        return losses

    def save(self):
        """Write a checkpoint."""
        self.checkpoints.save(self.learner, self.updates)

    def weights(self):
        """Copies of all parameters and buffers of the model, and of its average if it has one."""
        modules = [self.engine.module, *([] if self.average is None else [self.average])]
        return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def start_run(folder, world, **changes):
    """Start a run of the small recipe in ``folder``, with ``changes``."""
    return StartedRun(small_recipe(folder, **changes), world)
