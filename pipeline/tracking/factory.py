"""Open the tracker that fits a process: the journal's for the main one, else one that forgets."""

import importlib.metadata
import logging
import socket
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from pipeline.distributed import World
from pipeline.files import network_file_system
from pipeline.recipe.schema import Recipe
from pipeline.tracking.journal import JOURNAL
from pipeline.tracking.journal_tracker import JournalTracker
from pipeline.tracking.names import METRICS
from pipeline.tracking.store import check_uri, sqlite_file
from pipeline.tracking.system import SystemMonitor
from pipeline.tracking.tracker import NullTracker, Tracker

log = logging.getLogger(__name__)

# Their versions become tags of each run.
_DISTRIBUTIONS = ("coda-pipeline", "torch", "timm", "deepspeed", "ffcv", "mlflow")
_GIT_DESCRIBE = (
    *("git", "--no-optional-locks", "describe"),
    *("--always", "--dirty", "--abbrev=40", "--exclude=*"),
)


def open_tracker(
    recipe: Recipe,
    folder: Path,
    world: World,
    *,
    tags: Mapping[str, str] | None = None,
    names: Collection[str] | None = None,
) -> Tracker:
    """Open the tracker of a run, new or resumed.

    With ``tracking.system_metrics`` one process of every node also journals the load of its node.

    Args:
        recipe: the resolved recipe, which is stored in ``folder/recipe.yaml``.
        folder: of the run.
        world: this process among those of the run.
        tags: further tags of the run.
        names: of the metrics that the run may log; by default those of METRICS.

    Raises:
        UserError: a tracking URI that cannot work, or a damaged journal.
    """
    check_uri(recipe)
    watched = recipe.tracking.system_metrics and world.local_rank == 0
    monitor = SystemMonitor(folder) if watched else None
    if not world.is_main:
        return NullTracker(monitor)
    database = sqlite_file(recipe.tracking_uri)
    if database and (kind := network_file_system(database.parent)):
        log.warning(
            "%s lies on %s, where SQLite's locks are not safe: "
            "use tracking.uri=http://HOST:PORT of `coda serve`",
            database,
            kind,
        )
    tracker = JournalTracker(recipe, folder, monitor, METRICS if names is None else names)
    tracker.tags({**_origin(), "world_size": str(world.size), **(tags or {})})
    return tracker


def tracker_of(
    recipe: Recipe, folder: Path, world: World, *, names: Collection[str] | None = None
) -> Tracker:
    """Open the tracker of the finished run in ``folder``, wherever that was moved to.

    An export has no journal: its tracker forgets. Arguments and errors as for ``open_tracker``.
    """
    folder = Path(folder).resolve()
    if not (folder / JOURNAL).is_file():
        return NullTracker()
    tracking = replace(recipe.tracking, system_metrics=False)
    moved = replace(recipe, runs=str(folder.parent), tracking=tracking)
    return open_tracker(moved, folder, world, names=names)


def _origin() -> dict[str, str]:
    """Tags: host, versions of the building blocks, and the commit where this is a git checkout."""
    tags = {"host": socket.gethostname()}
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
