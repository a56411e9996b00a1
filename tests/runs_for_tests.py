"""Runs, loaders and reports of a recipe, as the tests make them."""

from pathlib import Path

from pipeline.data import loaders
from pipeline.data.prepared import open_prepared
from pipeline.recipe.schedules import learning_rate
from pipeline.recipe.schema import Recipe
from pipeline.reports.run import write_report
from pipeline.run_folder import RunFolder
from pipeline.training.setup import Setup


def train_loader(recipe, world, micro_batch):
    """The training loader of the recipe's prepared data."""
    return loaders.train_loader(recipe, open_prepared(recipe.data), world, micro_batch)


def eval_loader(recipe, world, batch_size, split="val"):
    """The loader of every image of the recipe's prepared data."""
    return loaders.eval_loader(recipe, open_prepared(recipe.data), world, batch_size, split)


def report(folder: Path, recipe: Recipe, world):
    """The report of the run or export in ``folder``."""
    return write_report(RunFolder(folder), recipe, open_prepared(recipe.data), world)


class StartedRun:
    """A run that goes on update by update, without evaluation and tracking."""

    def __init__(self, recipe, world):
        self.recipe, self.world = recipe, world
        self.setup = Setup(recipe, open_prepared(recipe.data), recipe.folder, world)
        self.updates = self.setup.take_over()
        self.learner, self.checkpoints = self.setup.learner, self.setup.checkpoints
        self.engine, self.average = self.learner.engine, self.learner.average

    def update(self, count):
        """Do ``count`` updates; their losses."""
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
