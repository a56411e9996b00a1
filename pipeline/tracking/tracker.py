"""What a training tells of itself: into the journal at once, and to MLflow by a thread of the main
process.
"""

import importlib.metadata
import json
import logging
import math
import queue
import socket
import subprocess
import threading
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pipeline.distributed import World
from pipeline.errors import tracebacks_wanted
from pipeline.files import network_file_system
from pipeline.recipe.schema import STORED, Recipe, flatten
from pipeline.tracking.journal import JOURNAL, RUN_KEY, Journal
from pipeline.tracking.names import METRICS
from pipeline.tracking.sender import Sender, check_uri, sqlite_file, store_errors
from pipeline.tracking.system import SystemMonitor

log = logging.getLogger(__name__)

# characters of a parameter
_VALUE_LENGTH = 6000
# between two looks at the journal: normally, and at most after failures
_SEND_SECONDS, _BACK_OFF_SECONDS = 2.0, 60.0
# for MLflow at the end of a finished run; of one that is left for its next start
_CLOSE_SECONDS, _LEAVE_SECONDS = 60.0, 3.0
_DISTRIBUTIONS = ("coda-pipeline", "torch", "timm", "deepspeed", "ffcv", "mlflow")


class Tracker:
    """Takes what a run has to tell, and forgets it: this class itself is the tracker of all
    processes but the main one.

    A context manager: leaves the run FINISHED, after an exception FAILED, after KeyboardInterrupt
    or SystemExit KILLED.
    """

    def __init__(self, monitor: SystemMonitor | None = None) -> None:
        self._monitor = monitor

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow has it."""
        return None

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Note values at a step. A second value for one (name, step) is dropped: a resumed run
        computes the same again.

        NaN and infinity, which MLflow does not keep as such, become the tag ``nonfinite/<name>``.

        Raises:
            ValueError: a name that METRICS does not have.
        """

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags; the last value stays."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Have the file at ``path`` copied into ``folder`` of the run's artifacts, as it is when
        its turn comes.
        """

    def image(self, path: Path, name: str, step: int) -> None:
        """Have the PNG file at ``path`` shown under ``name`` at ``step``: MLflow has a slider over
        the steps of a name.
        """

    def dataset(self, context: str, name: str, file: Path, digest: str, **profile: int) -> None:
        """Note that ``file`` was read for ``context`` (training or validation); ``digest`` of at
        most 36 characters tells its content.
        """

    def model(self, export: Path) -> None:
        """Have the exported model of ``mlflow.pyfunc`` logged as ``model``, and registered under
        the name of its architecture.
        """

    def sync_to_disk(self) -> None:
        """Return once the journal is on the disk. Called before a checkpoint, it keeps the journal
        from being behind.
        """

    def flush(self, timeout: float = 60.0) -> bool:
        """``sync_to_disk``, then one attempt, of ``timeout`` seconds at most, to bring MLflow up to
        date; its success.
        """
        return True

    def close(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED; waits for MLflow, a finished run longer. A
        second call does nothing.
        """
        if self._monitor:
            self._monitor.stop()

    def history(self) -> dict[tuple[str, int], float]:
        """All metrics of the run since its first start: (name, step) -> value."""
        return {}

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("FINISHED" if kind is None else "KILLED" if killed else "FAILED")


def open_tracker(
    recipe: Recipe, folder: Path, world: World, *, tags: Mapping[str, str] | None = None
) -> Tracker:
    """The tracker of the run in ``folder``, new or resumed, whose resolved recipe is stored in
    ``folder/recipe.yaml``.

    With ``tracking.system_metrics`` one process of every node also journals the load of its node.

    Raises:
        UserError: a tracking URI that cannot work, or a damaged journal.
    """
    check_uri(recipe)
    monitor = (
        SystemMonitor(folder) if recipe.tracking.system_metrics and world.local_rank == 0 else None
    )
    if not world.is_main:
        return Tracker(monitor)
    database = sqlite_file(recipe.tracking_uri)
    if database and (kind := network_file_system(database.parent)):
        log.warning(
            "%s lies on %s, where SQLite's locks are not safe: use tracking.uri=http://HOST:PORT of `coda serve`",
            database,
            kind,
        )
    tracker = _JournalTracker(recipe, folder, monitor)
    tracker.tags({**_origin(), "world_size": str(world.size), **(tags or {})})
    return tracker


def tracker_of(recipe: Recipe, folder: Path, world: World) -> Tracker:
    """The tracker of the finished run in ``folder``, wherever it was moved to; one that forgets for
    an export, which has none.
    """
    folder = Path(folder).resolve()
    if not (folder / JOURNAL).is_file():
        return Tracker()
    tracking = replace(recipe.tracking, system_metrics=False)
    return open_tracker(replace(recipe, runs=str(folder.parent), tracking=tracking), folder, world)


class _JournalTracker(Tracker):
    """The tracker of the main process: the journal, and the thread that sends it."""

    def __init__(self, recipe: Recipe, folder: Path, monitor: SystemMonitor | None) -> None:
        super().__init__(monitor)
        self._folder = Path(folder).resolve()
        self._journal = Journal(self._folder / JOURNAL)
        self._sender = Sender(recipe, self._folder)
        self._closed = False
        if not self._journal.size:
            self.tags({RUN_KEY: uuid.uuid4().hex})
        params, known = (
            {key: _text(value) for key, value in flatten(recipe.to_dict()).items()},
            self._journal.known,
        )
        self._journal.append(
            "param", {key: value for key, value in params.items() if key not in known["param"]}
        )
        # MLflow lets no parameter change: one that did since the first start stands beside it as a
        # tag.
        self.tags(
            {
                key: value
                for key, value in params.items()
                if key in known["tag"] or known["param"][key] != value
            }
        )
        self.artifact(self._folder / STORED)
        self._journal.append("status", {"status": "RUNNING"})
        self._requests: queue.SimpleQueue[threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._send_until_closed, name="mlflow-sender", daemon=True
        )
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        return self._sender.run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        step, numbers = int(step), {name: float(value) for name, value in values.items()}
        for name in numbers:
            if name not in METRICS:
                raise ValueError(f"metric {name!r} does not stand in pipeline.tracking.METRICS")
        known = self._journal.known["metric"]
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self._journal.append(
            "metric",
            {name: value for name, value in finite.items() if (name, step) not in known},
            step=step,
        )
        self.tags(
            {
                f"nonfinite/{name}": f"{value} at step {step}"
                for name, value in numbers.items()
                if name not in finite
            }
        )

    def tags(self, values: Mapping[str, str]) -> None:
        known = self._journal.known["tag"]
        self._journal.append(
            "tag",
            {key: text[:_VALUE_LENGTH] for key, text in values.items() if known.get(key) != text},
        )

    def artifact(self, path: Path, folder: str = "") -> None:
        self._journal.append("artifact", {self._stored_path(path): folder})

    def image(self, path: Path, name: str, step: int) -> None:
        if (name, step) not in self._journal.known["image"]:
            self._journal.append("image", {name: self._stored_path(path)}, step=step)

    def dataset(self, context: str, name: str, file: Path, digest: str, **profile: int) -> None:
        value = {"name": name, "source": str(Path(file).resolve()), "digest": digest, **profile}
        if self._journal.known["dataset"].get(context, {}).get("digest") != digest:
            self._journal.append("dataset", {context: value})

    def model(self, export: Path) -> None:
        if "model" not in self._journal.known["model"]:
            self._journal.append("model", {"model": self._stored_path(export)})

    def _stored_path(self, path: Path) -> str:
        """Relative to the run's folder where it lies inside, since that may be moved."""
        path = Path(path).resolve()
        return str(path.relative_to(self._folder) if path.is_relative_to(self._folder) else path)

    def sync_to_disk(self) -> None:
        self._journal.sync_to_disk()

    def flush(self, timeout: float = 60.0) -> bool:
        if not self._closed:
            self.sync_to_disk()
            done = threading.Event()
            self._requests.put(done)
            done.wait(timeout)
        return self._sender.offset >= self._journal.size

    def close(self, status: str = "FINISHED") -> None:
        if self._closed:
            return
        super().close()
        self._journal.append("status", {"status": status})
        if not self.flush(_CLOSE_SECONDS if status == "FINISHED" else _LEAVE_SECONDS):
            log.warning(
                "MLflow does not have all of this run yet; `coda sync %s` sends the rest",
                self._folder,
            )
        self._closed = True
        self._requests.put(None)
        self._journal.close()

    def history(self) -> dict[tuple[str, int], float]:
        return dict(self._journal.known["metric"])

    def _send_until_closed(self) -> None:
        pause, failures = 0.0, 0
        while True:
            try:
                request = self._requests.get(timeout=pause)
            except queue.Empty:
                request = threading.Event()
            if request is None:
                return
            try:
                for _ in self._sender.send():
                    pass
                failures = 0
            except Exception as error:
                # the journal keeps what was not sent, and training goes on
                if not failures:
                    known = isinstance(error, store_errors() + (OSError,))
                    reason = "MLflow cannot be reached" if known else "sending to MLflow fails"
                    trace = tracebacks_wanted() or not known
                    log.warning(
                        "%s; training goes on, the journal is sent later: %.300r",
                        reason,
                        error,
                        exc_info=trace,
                    )
                failures += 1
            pause = min(_SEND_SECONDS * 2**failures, _BACK_OFF_SECONDS)
            request.set()


def _text(value: object) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:_VALUE_LENGTH]


def _origin() -> dict[str, str]:
    """Tags: host, versions of the building blocks, and the commit where this is a git checkout."""
    tags = {"host": socket.gethostname()}
    for name in _DISTRIBUTIONS:
        try:
            tags[f"version/{name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = [
        "git",
        "--no-optional-locks",
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        answer = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        tags["git_commit"] = answer.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        # no git, no checkout, no commit yet
        pass
    return tags
