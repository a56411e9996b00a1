"""Send the journals of a run to MLflow: in order, in batches, until all is there, nothing twice."""

import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.recipe.load import load_stored
from pipeline.recipe.schema import Recipe
from pipeline.run_folder import RunFolder
from pipeline.tracking.deliver import deliver
from pipeline.tracking.journal import (
    KINDS,
    RUN_KEY_TAG,
    Record,
    RunJournal,
    is_open,
)
from pipeline.tracking.store import (
    check_uri,
    experiment_id,
    mlflow_client,
    sole_run,
    store_errors,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# Of the parent run of a sweep: the sweep's name.
SWEEP_NAME_TAG = "coda.sweep"
# Of a child in a sweep: the id of its parent run. MLflow's pages read this tag.
PARENT_ID_TAG = "mlflow.parentRunId"
# Entries of each kind that MLflow takes at once.
_BATCH_SIZES = dict.fromkeys(KINDS, 1) | {"metric": 1000, "param": 100, "tag": 100}
# After which the parents of one sweep that several jobs created at the same time are visible to
# all of them.
_RACE_SECONDS = 2.0
# A parent run ends with the first of these that one of its children has, else FINISHED.
_WORST_FIRST = ("RUNNING", "FAILED", "KILLED")
_MAX_CHILDREN = 50_000


class Sender:
    """Brings the journals of one run to MLflow, from the acknowledged offsets on.

    Beside the offset of each journal it keeps in the run's folder ``run_id`` and ``experiment_id``,
    MLflow's names of the run.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self._recipe = recipe
        self._folder = folder
        self._uri = folder.tracking_uri(recipe.tracking.uri)
        self._client: MlflowClient | None = None
        self.run_id = _read_if_there(folder.run_id)

    @property
    def offset(self) -> int:
        """Bytes of the run's own journal that MLflow has."""
        return _offset(self._folder.journal)

    def send(self) -> Iterator[int]:
        """Send all complete lines beyond the offsets.

        Yields:
            The number of lines of each batch that MLflow took.
        """
        for path in (self._folder.journal, *self._folder.node_journals):
            with open(path, "rb") as journal:
                if _offset(path) >= os.fstat(journal.fileno()).st_size:
                    continue
                # A power failure must not take from the journal what MLflow already knows.
                os.fsync(journal.fileno())
                client = self._connected()
                # Read anew: connecting may have removed the offsets.
                offset = _offset(path)
                journal.seek(offset)
                for kind, records, size in _batches(journal):
                    deliver(
                        client, str(self.run_id), self._folder.path, self._recipe, kind, records
                    )
                    if kind == "status":
                        self._keep_family(client, ended=records[0]["value"] != "RUNNING")
                    offset += size
                    write_atomically(path.with_suffix(".offset"), str(offset).encode())
                    yield len(records)

    def _connected(self) -> "MlflowClient":
        if self._client is None:
            client = mlflow_client(self._uri)
            self._find_run(client)
            self._client = client
        return self._client

    def _find_run(self, client: "MlflowClient") -> None:
        """Find the run by its stored id, else by the key in the journal, else create it."""
        from mlflow.exceptions import MlflowException

        if self.run_id:
            try:
                run = client.get_run(self.run_id)
                write_atomically(self._folder.experiment_id, run.info.experiment_id.encode())
                return
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        # A store that does not know the run gets the whole journal.
        for path in self._folder.path.glob("*.offset"):
            path.unlink()
        run = self._own_run(
            client, experiment_id(client, self._recipe.tracking.experiment, self._uri)
        )
        self.run_id = run.info.run_id
        write_atomically(self._folder.experiment_id, run.info.experiment_id.encode())
        write_atomically(self._folder.run_id, run.info.run_id.encode())

    def _own_run(self, client: "MlflowClient", experiment: str) -> "Run":
        """The run with the key in the journal's first line, created if it is not there."""
        with open(self._folder.journal, "rb") as journal:
            first = json.loads(journal.readline())
        tags = {RUN_KEY_TAG: first["value"]}

        def create() -> None:
            client.create_run(experiment, first["timestamp"], tags, self._recipe.name)

        return sole_run(client, experiment, RUN_KEY_TAG, first["value"], create, self.run_id)

    def _keep_family(self, client: "MlflowClient", ended: bool) -> None:
        """Keep the run the only one of its key; set the status of its sweep's parent.

        Called after each change of the run's status. The parent runs while a child does.
        """
        experiment = str(_read_if_there(self._folder.experiment_id))
        self._own_run(client, experiment)
        sweep = self._recipe.tracking.parent
        if not sweep:
            return

        def create() -> None:
            client.create_run(experiment, tags={SWEEP_NAME_TAG: sweep}, run_name=sweep)
            time.sleep(_RACE_SECONDS)

        parent = sole_run(client, experiment, SWEEP_NAME_TAG, sweep, create).info.run_id
        client.set_tag(str(self.run_id), PARENT_ID_TAG, parent)
        if not ended:
            client.update_run(parent, "RUNNING")
            return
        wanted = f"tags.`{PARENT_ID_TAG}` = '{parent}'"
        children = client.search_runs([experiment], wanted, max_results=_MAX_CHILDREN)
        statuses = {child.info.status for child in children}
        worst = next((status for status in _WORST_FIRST if status in statuses), "FINISHED")
        if worst != "RUNNING":
            client.set_terminated(parent, worst)


def sync(folder: Path, overrides: Iterable[str] = ()) -> int:
    """Send what MLflow has not received of the run in ``folder``, or of all runs in it.

    A run that was killed hard could not report its end: it becomes KILLED, if it ran on this
    machine and no process writes its journal any more.

    Args:
        folder: of a run, wherever it was copied to, or of runs.
        overrides: of the recipe, such as ``tracking.uri=http://HOST:PORT``.

    Returns:
        The number of lines sent.

    Raises:
        UserError: no journal or no valid recipe.yaml in ``folder``, or MLflow cannot be reached.
    """
    given = RunFolder(Path(folder).resolve())
    runs = [given] if given.journal.is_file() else _runs_in(given.path)
    if not runs:
        raise UserError(
            f"{given}: has no {given.journal.name}; "
            "`coda sync` takes the folder of a run, or a folder of runs"
        )
    changes = list(overrides)
    return sum(_sync_run(run, changes) for run in runs)


def _runs_in(folder: Path) -> list[RunFolder]:
    runs = [RunFolder(path) for path in sorted(folder.glob("*"))]
    return [run for run in runs if run.journal.is_file()]


def _sync_run(folder: RunFolder, overrides: list[str]) -> int:
    recipe = load_stored(folder.path, overrides)
    check_uri(folder.tracking_uri(recipe.tracking.uri))
    if not is_open(folder.journal):
        _note_death(folder.journal)
    sent = 0
    batches = Sender(recipe, folder).send()
    try:
        for lines in tqdm(batches, desc=f"sync {folder.name}", unit=" batches", disable=None):
            sent += lines
    except store_errors() as error:
        raise UserError(
            f"{folder}: MLflow took {sent} lines, then failed; sync again later: {error!r:.300}"
        ) from error
    return sent


def _note_death(path: Path) -> None:
    """End a run as KILLED that was running on this machine and is not any more."""
    if not path.read_bytes().endswith(b"\n"):
        # This is a copy that was made while the run wrote: the rest may still come.
        return
    journal = RunJournal(path)
    running = journal.known["status"].get("status") == "RUNNING"
    if running and journal.known["tag"].get("host") == os.uname().nodename:
        journal.append("status", {"status": "KILLED"}, timestamp=journal.last_time)
    journal.close()


def _batches(lines: Iterable[bytes]) -> Iterator[tuple[str, list[Record], int]]:
    """(kind, records, bytes) of consecutive lines of one kind, as many as MLflow takes at once."""
    # The last line may be half written.
    entries = ((json.loads(line), len(line)) for line in lines if line.endswith(b"\n"))
    for kind, group in itertools.groupby(entries, key=lambda entry: entry[0]["kind"]):
        while batch := list(itertools.islice(group, _BATCH_SIZES[kind])):
            yield kind, [record for record, _ in batch], sum(size for _, size in batch)


def _offset(journal: Path) -> int:
    """Bytes of a journal that MLflow has acknowledged."""
    return int(_read_if_there(journal.with_suffix(".offset")) or 0)


def _read_if_there(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
