"""All that a training run needs, made and checked before anything is written."""

import logging

from pipeline.data.loaders import eval_loader, train_loader
from pipeline.data.memory import check_memory
from pipeline.data.prepared import PreparedData
from pipeline.distributed import World, run_collectively
from pipeline.recipe.schema import Recipe
from pipeline.run_folder import RunFolder
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.learner import Learner
from pipeline.training.lease import Lease

log = logging.getLogger(__name__)


class Setup:
    """Loaders, learner and checkpoints of a run. Every process must make it at the same time.

    Args:
        recipe: of the run.
        prepared: its data.
        folder: where it keeps what it knows.
        world: this process among all.

    Attributes:
        batches, validation: loaders of both splits.
        learner: the network under its engine.
        checkpoints: of the run; ``resumed_from`` is the newest valid one, None if there is none.
        lease: the right to write into the folder.
        updates_per_epoch, total_updates: optimiser updates.

    Raises:
        UserError: the recipe does not fit the data or the number of processes, or names no model.
    """

    def __init__(
        self, recipe: Recipe, prepared: PreparedData, folder: RunFolder, world: World
    ) -> None:
        self.recipe, self.prepared, self.folder, self.world = recipe, prepared, folder, world
        micro_batch, _ = recipe.micro_batch(world.size)
        check_memory(recipe, prepared, world, micro_batch)
        self.batches = train_loader(recipe, prepared, world, micro_batch)
        self.validation = eval_loader(recipe, prepared, world, recipe.evaluation.batch_size)
        self.updates_per_epoch = self.batches.samples // recipe.training.global_batch_size
        self.total_updates = recipe.training.epochs * self.updates_per_epoch
        self.lease = Lease(folder.lease, world.incarnation)
        classes = prepared.classes
        self.checkpoints = Checkpoints(folder.checkpoints, world, classes, self.lease)
        self.resumed_from = self.checkpoints.newest()
        self.learner = Learner(recipe, len(classes), world, fresh=self.resumed_from is None)

    def take_over(self) -> int:
        """Become the one who writes into the folder, and load the checkpoint that was its newest.

        Every process must call it.

        Returns:
            optimiser updates done so far.

        Raises:
            UserError: a later start has the folder, or the checkpoint does not fit.
        """
        run_collectively(self.lease.take, main_only=True)
        run_collectively(self.checkpoints.remove_unfinished, main_only=True)
        if self.resumed_from is None:
            return 0
        updates = self.checkpoints.load(self.learner, self.resumed_from)
        log.info("resumed %s at update %d of %d", self.folder, updates, self.total_updates)
        return updates
