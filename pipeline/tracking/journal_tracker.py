"""The tracker of the main process: a journal at once, and a thread that brings it to MLflow."""

import json
import logging
import math
import queue
import threading
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path

from pipeline.errors import tracebacks_wanted
from pipeline.recipe.schema import Recipe, flatten
from pipeline.run_folder import RunFolder
from pipeline.tracking.journal import RUN_KEY_TAG, RunJournal
from pipeline.tracking.sender import Sender
from pipeline.tracking.store import store_errors
from pipeline.tracking.system import SystemMonitor
from pipeline.tracking.tracker import Tracker

log = logging.getLogger(__name__)

# Characters that MLflow keeps of a parameter or a tag.
_VALUE_LENGTH = 6000
# Between two looks at the journal: normally, and at most after failures.
_SEND_SECONDS = 2.0
_BACK_OFF_SECONDS = 60.0
# For MLflow at the end of a finished run, and of one that is left for its next start.
_FINISH_SECONDS = 60.0
_LEAVE_SECONDS = 3.0


class JournalTracker(Tracker):
    """Writes what a run reports to its journal, and sends the journal to MLflow in the background.

    Args:
        recipe: the resolved recipe of the run.
        folder: of the run; the recipe is stored in it.
        monitor: of this process's node, which ``close`` stops.
        names: of the metrics that may be logged.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        monitor: SystemMonitor | None,
        names: Collection[str],
    ) -> None:
        self._folder = RunFolder(folder.path.resolve())
        self._monitor = monitor
        self._names = names
        self._journal = RunJournal(self._folder.journal)
        self._sender = Sender(recipe, self._folder)
        self._closed = False
        self._begin(recipe)
        self._requests: queue.SimpleQueue[threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._send_until_closed, name="mlflow-sender", daemon=True
        )
        self._thread.start()

    def _begin(self, recipe: Recipe) -> None:
        """Write the key by which the run is found, its parameters, its recipe and its status."""
        if not self._journal.size:
            self.tags({RUN_KEY_TAG: uuid.uuid4().hex})
        params = {key: _text(value) for key, value in flatten(recipe.to_dict()).items()}
        known = self._journal.known
        new = {key: value for key, value in params.items() if key not in known["param"]}
        self._journal.append("param", new)
        # MLflow lets no parameter change: one that changed since the first start becomes a tag,
        # and that tag follows it from then on.
        changed = {
            key: value
            for key, value in params.items()
            if key in known["tag"] or known["param"][key] != value
        }
        self.tags(changed)
        self.artifact(self._folder.recipe)
        self._journal.append("status", {"status": "RUNNING"})

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow has it."""
        return self._sender.run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log the values that are new at this step; see ``Tracker``."""
        step = int(step)
        numbers = {name: float(value) for name, value in values.items()}
        for name in numbers:
            if name not in self._names:
                raise ValueError(f"metric {name!r} is not in the table of metric names")
        known = self._journal.known["metric"]
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        new = {name: value for name, value in finite.items() if (name, step) not in known}
        self._journal.append("metric", new, step=step)
        others = {
            f"nonfinite/{name}": f"{value} at step {step}"
            for name, value in numbers.items()
            if name not in finite
        }
        self.tags(others)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set the tags that are new or have another value."""
        known = self._journal.known["tag"]
        changed = {
            key: text[:_VALUE_LENGTH] for key, text in values.items() if known.get(key) != text
        }
        self._journal.append("tag", changed)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Have the file sent; each call sends it again."""
        self._journal.append("artifact", {self._stored_path(path): folder})

    def image(self, path: Path, name: str, step: int) -> None:
        """Have the picture sent, unless there is one of this name and step."""
        if (name, step) not in self._journal.known["image"]:
            self._journal.append("image", {name: self._stored_path(path)}, step=step)

    def dataset(self, context: str, name: str, file: Path, digest: str, **profile: int) -> None:
        """Note the data set, unless it is the one already noted for ``context``."""
        value = {"name": name, "source": str(Path(file).resolve()), "digest": digest, **profile}
        if self._journal.known["dataset"].get(context, {}).get("digest") != digest:
            self._journal.append("dataset", {context: value})

    def model(self, export: Path) -> None:
        """Have the export logged, unless one was."""
        if "model" not in self._journal.known["model"]:
            self._journal.append("model", {"model": self._stored_path(export)})

    def _stored_path(self, path: Path) -> str:
        """``path``, relative to the run's folder where it lies inside, since that may be moved."""
        path, folder = Path(path).resolve(), self._folder.path
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

    def sync_to_disk(self) -> None:
        """Return once the journal is on the disk."""
        self._journal.sync_to_disk()

    def flush(self, timeout: float = 60.0) -> bool:
        """Sync the journal to the disk and let the thread send it now; see ``Tracker``."""
        if not self._closed:
            self.sync_to_disk()
            done = threading.Event()
            self._requests.put(done)
            done.wait(timeout)
        return self._sender.offset >= self._journal.size

    def close(self, status: str = "FINISHED") -> None:
        """End the run with ``status``; warn if MLflow does not have all of it by then."""
        if self._closed:
            return
        if self._monitor:
            self._monitor.stop()
        self._journal.append("status", {"status": status})
        if not self.flush(_FINISH_SECONDS if status == "FINISHED" else _LEAVE_SECONDS):
            log.warning(
                "MLflow does not have all of this run yet; `coda sync %s` sends the rest",
                self._folder,
            )
        self._closed = True
        self._requests.put(None)
        self._journal.close()

    def history(self) -> dict[tuple[str, int], float]:
        """All metrics of the journal: (name, step) -> value."""
        return dict(self._journal.known["metric"])

    def _send_until_closed(self) -> None:
        """Send at every request, and now and then without one; the thread's work."""
        pause = 0.0
        failures = 0
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
                # The journal keeps what was not sent, and training goes on. What is not understood
                # is logged with its traceback.
                if not failures:
                    _warn_unsent(error)
                failures += 1
            pause = min(_SEND_SECONDS * 2**failures, _BACK_OFF_SECONDS)
            request.set()


def _warn_unsent(error: Exception) -> None:
    known = isinstance(error, (*store_errors(), OSError))
    log.warning(
        "%s; training goes on, the journal is sent later: %.300r",
        "MLflow cannot be reached" if known else "sending to MLflow fails",
        error,
        exc_info=tracebacks_wanted() or not known,
    )


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:_VALUE_LENGTH]
