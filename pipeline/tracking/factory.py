"""Open the tracker that fits a process: the journal's for the main one, else one that forgets."""

import importlib.metadata
import logging
import socket
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from pipeline import __version__
from pipeline.distributed import World
from pipeline.files import network_file_system
from pipeline.recipe.schema import Recipe
from pipeline.run_folder import RunFolder
from pipeline.tracking.journal_tracker import JournalTracker
from pipeline.tracking.names import TRAINING_NAMES
from pipeline.tracking.store import check_uri, sqlite_file
from pipeline.tracking.system import SystemMonitor
from pipeline.tracking.tracker import NullTracker, Tracker

log = logging.getLogger(__name__)

# Their versions become tags of each run.
_DISTRIBUTIONS = ("torch", "timm", "deepspeed", "ffcv", "mlflow")
_GIT_DESCRIBE = (
    *("git", "--no-optional-locks", "describe"),
    *("--always", "--dirty", "--abbrev=40", "--exclude=*"),
)


def open_tracker(
    recipe: Recipe,
    folder: RunFolder,
    world: World,
    *,
    tags: Mapping[str, str] | None = None,
    names: Collection[str] = (),
) -> Tracker:
    """Open the tracker of a run, new or resumed.

    With ``tracking.system_metrics`` one process of every node also journals the load of its node.

    Args:
        recipe: the resolved recipe, which is stored in ``folder``.
        folder: of the run, wherever that was moved to.
        world: this process among those of the run.
        tags: further tags of the run.
        names: that the run may log beside TRAINING_NAMES.

    Raises:
        UserError: a tracking URI that cannot work, or a damaged journal.
    """
    uri = folder.tracking_uri(recipe.tracking.uri)
    check_uri(uri)
    watched = recipe.tracking.system_metrics and world.local_rank == 0
    monitor = SystemMonitor(folder) if watched else None
    if not world.is_main:
        return NullTracker(monitor)
    database = sqlite_file(uri)
    if database and (kind := network_file_system(database.parent)):
        log.warning(
            "%s lies on %s, where SQLite's locks are not safe: "
            "use tracking.uri=http://HOST:PORT of `coda serve`",
            database,
            kind,
        )
    tracker = JournalTracker(recipe, folder, monitor, {*TRAINING_NAMES, *names})
    tracker.tags({**_origin(), "world_size": str(world.size), **(tags or {})})
    return tracker


def tracker_of(
    recipe: Recipe, folder: RunFolder, world: World, *, names: Collection[str] = ()
) -> Tracker:
    """Open the tracker of the finished run in ``folder``.

    An export has no journal: its tracker forgets. Arguments and errors as for ``open_tracker``.
    """
    if not folder.journal.is_file():
        return NullTracker()
    quiet = replace(recipe, tracking=replace(recipe.tracking, system_metrics=False))
    return open_tracker(quiet, folder, world, names=names)


def _origin() -> dict[str, str]:
    """Tags: host, versions of the building blocks, and the commit where this is a git checkout."""
    tags = {"host": socket.gethostname(), "version/coda-pipeline": __version__}
    for name in _DISTRIBUTIONS:
        try:
            tags[f"version/{name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        answer = subprocess.run(
            _GIT_DESCRIBE,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        # There is no git, no checkout or no commit yet.
        return tags
    tags["git_commit"] = answer.stdout.strip()
    return tags
