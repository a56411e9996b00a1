"""A training run, from the recipe to its report."""

import os

import yaml

from pipeline.data import manifest
from pipeline.data.prepare import prepare
from pipeline.data.prepared import PreparedData, open_prepared
from pipeline.distributed import World, barrier, gather_across_ranks, run_collectively
from pipeline.errors import UserError
from pipeline.evaluation.metrics import tracked_names
from pipeline.export import export
from pipeline.files import write_atomically
from pipeline.recipe.load import load_stored
from pipeline.recipe.schema import Recipe
from pipeline.reports.run import track, write_report
from pipeline.run_folder import RunFolder
from pipeline.slurm import job_tags, report_event
from pipeline.tracking import Tracker, open_tracker
from pipeline.training.engine import load_deepspeed
from pipeline.training.failures import Watchdog, first_error
from pipeline.training.loop import Trainer
from pipeline.training.setup import Setup
from pipeline.training.stop import Stop


def train(recipe: Recipe, world: World) -> None:
    """Train to the recipe's last update, from the newest checkpoint of its run if there is one.

    Every process must call it. The run folder then holds all that ``RunFolder`` lists; the export,
    the evaluation and the pictures are made from the final weights.

    Args:
        recipe: of the run.
        world: this process among all.

    Raises:
        UserError: the recipe does not fit the data, the number of processes, or the run that is in
            the folder already.
        OSError: the disk is full or failing.
    """
    load_deepspeed()
    folder = recipe.folder
    with Stop(world) as stop:
        with stop.at_once():
            prepared = _prepared(recipe)
        _check_same_run(recipe, folder)
        with first_error(folder, world, stop):
            setup = Setup(recipe, prepared, folder, world)
            # Every process has checked data, recipe and folder before one writes.
            barrier()
            with Watchdog(folder, world) as watchdog:
                updates = setup.take_over()
                stored = yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode()
                run_collectively(lambda: write_atomically(folder.recipe, stored), main_only=True)
                tags, names = _tags(prepared), tracked_names()
                with open_tracker(recipe, folder, world, tags=tags, names=names) as tracker:
                    _log_data(recipe, prepared, tracker)
                    Trainer(setup, updates, tracker, stop, watchdog).train()
                    with stop.at_once():
                        _finish(setup, tracker)
        if world.is_main:
            report_event("finished")


def _prepared(recipe: Recipe) -> PreparedData:
    """Open the prepared data; prepare it first if there is none.

    Files that are there and damaged are for `coda prepare` to replace.
    """
    if not gather_across_ranks((recipe.data.folder / manifest.MANIFEST_NAME).exists())[0]:
        prepare(recipe)
    return open_prepared(recipe.data)


def _check_same_run(recipe: Recipe, folder: RunFolder) -> None:
    """Raise UserError if the folder holds a run of another recipe."""
    if not folder.recipe.exists():
        return
    stored, wanted = load_stored(folder.path).identity(), recipe.identity()
    for key in sorted({*stored, *wanted}):
        if stored.get(key) != wanted.get(key):
            raise UserError(
                f"run {folder}: was started with {key} = {stored.get(key)!r}, the recipe says "
                f"{wanted.get(key)!r}; give the run another name, or set it back"
            )


def _tags(prepared: PreparedData) -> dict[str, str]:
    """Tags of the job, and of the manifest, which itself has the hashes of the data's files."""
    return {**job_tags(os.environ), "data/manifest_sha256": prepared.manifest.sha256}


def _log_data(recipe: Recipe, prepared: PreparedData, tracker: Tracker) -> None:
    for context, name in (("training", "train"), ("validation", "val")):
        split = prepared.split(name)
        tracker.dataset(
            context,
            f"{recipe.data.source}-{name}",
            prepared.original(name),
            split.tables_sha256[:16],
            samples=split.samples,
            classes=len(prepared.classes),
        )


def _finish(setup: Setup, tracker: Tracker) -> None:
    """Export the final weights, write the report, and log it."""
    recipe, folder, model = setup.recipe, setup.folder, setup.learner.result
    classes = setup.prepared.classes
    run_collectively(lambda: export(model, recipe, classes, folder.export), main_only=True)
    track(tracker, recipe, folder, write_report(folder, recipe, setup.prepared, setup.world))
    tracker.model(folder.export)
