"""How the journals of a run get to MLflow: in order, in batches, as often as it takes, and nothing
twice.
"""

import itertools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.recipe.load import load_stored
from pipeline.recipe.schema import Recipe
from pipeline.tracking.deliver import deliver
from pipeline.tracking.journal import JOURNAL, KINDS, NODE_JOURNALS, RUN_KEY, Journal, is_open

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

URI = re.compile(r"sqlite:///(?P<file>.+)|(https?|(postgresql|mysql|mssql)(\+\w+)?)://[^/]+.*")
# tags: of the parent run of a sweep its name, of a child its parent
SWEEP, PARENT = "coda.sweep", "mlflow.parentRunId"
# entries that MLflow takes at once
_LIMITS = dict.fromkeys(KINDS, 1) | {"metric": 1000, "param": 100, "tag": 100}
# in which parents of one sweep, created at the same time by several jobs, become visible to all of
# them
_RACE_SECONDS = 2.0


class Sender:
    """Brings the journals of one run to MLflow, from the acknowledged offsets on.

    Beside the offset of each journal it keeps in the run's folder ``run_id`` and ``experiment_id``,
    MLflow's names of the run.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe, self._folder = recipe, folder
        self._client: MlflowClient | None = None
        self.run_id = _stored(folder / "run_id")

    @property
    def offset(self) -> int:
        """Bytes of the training's own journal that MLflow has."""
        return self._offset(self._folder / JOURNAL)

    def send(self) -> Iterator[int]:
        """Send all complete lines beyond the offsets; yields the number of lines of each batch that
        MLflow took.
        """
        for path in (self._folder / JOURNAL, *sorted(self._folder.glob(NODE_JOURNALS))):
            with open(path, "rb") as journal:
                if self._offset(path) >= os.fstat(journal.fileno()).st_size:
                    continue
                # what MLflow knows, no power failure takes from the journal
                os.fsync(journal.fileno())
                client = self._connected()
                offset = self._offset(path)
                journal.seek(offset)
                for kind, records, size in _batches(journal):
                    deliver(client, str(self.run_id), self._folder, self._recipe, kind, records)
                    if kind == "status":
                        self._keep_family(client, ended=records[0]["value"] != "RUNNING")
                    offset += size
                    write_atomically(path.with_suffix(".offset"), str(offset).encode())
                    yield len(records)

    def _offset(self, journal: Path) -> int:
        return int(_stored(journal.with_suffix(".offset")) or 0)

    def _connected(self) -> "MlflowClient":
        if self._client is None:
            client = mlflow_client(self._recipe.tracking_uri)
            self._find_run(client)
            self._client = client
        return self._client

    def _find_run(self, client: "MlflowClient") -> None:
        """Take up the run of the stored id, else the one with the key in the journal's first line,
        else create it.
        """
        from mlflow.exceptions import MlflowException

        if self.run_id:
            try:
                run = client.get_run(self.run_id)
                write_atomically(self._folder / "experiment_id", run.info.experiment_id.encode())
                return
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        for path in self._folder.glob("*.offset"):
            # a store that does not know the run gets the whole journal
            path.unlink()
        run = self._own_run(client, _experiment(client, self._recipe))
        self.run_id = run.info.run_id
        write_atomically(self._folder / "experiment_id", run.info.experiment_id.encode())
        write_atomically(self._folder / "run_id", run.info.run_id.encode())

    def _own_run(self, client: "MlflowClient", experiment: str) -> "Run":
        with open(self._folder / JOURNAL, "rb") as journal:
            first = json.loads(journal.readline())

        def create() -> None:
            client.create_run(
                experiment, first["timestamp"], {RUN_KEY: first["value"]}, self._recipe.name
            )

        return _sole_run(client, experiment, RUN_KEY, first["value"], create, self.run_id)

    def _keep_family(self, client: "MlflowClient", ended: bool) -> None:
        """After a change of status: see that the run is there once, and in a sweep that its parent
        runs while a child does.
        """
        experiment = str(_stored(self._folder / "experiment_id"))
        self._own_run(client, experiment)
        if not (sweep := self._recipe.tracking.parent):
            return

        def create() -> None:
            client.create_run(experiment, tags={SWEEP: sweep}, run_name=sweep)
            time.sleep(_RACE_SECONDS)

        parent = _sole_run(client, experiment, SWEEP, sweep, create).info.run_id
        client.set_tag(str(self.run_id), PARENT, parent)
        if not ended:
            client.update_run(parent, "RUNNING")
            return
        statuses = [
            child.info.status
            for child in client.search_runs(
                [experiment], f"tags.`{PARENT}` = '{parent}'", max_results=50_000
            )
        ]
        worst = next(
            (status for status in ("RUNNING", "FAILED", "KILLED") if status in statuses), "FINISHED"
        )
        if worst != "RUNNING":
            client.set_terminated(parent, worst)


def sync(folder: Path, overrides: Iterable[str] = ()) -> int:
    """Send what MLflow has not received of the run in ``folder``, or of all runs in it; the number
    of lines sent.

    A run that was killed hard could not say so: where it ran, and when no process writes its
    journal any more, it becomes KILLED.

    Args:
        folder: of a run, wherever it was copied to, or of runs.
        overrides: of the recipe, such as ``tracking.uri=http://HOST:PORT``.

    Raises:
        UserError: no journal or no valid recipe.yaml in ``folder``, or MLflow cannot be reached.
    """
    folder = Path(folder).resolve()
    runs = (
        [folder]
        if (folder / JOURNAL).is_file()
        else sorted(path.parent for path in folder.glob(f"*/{JOURNAL}"))
    )
    if not runs:
        raise UserError(
            f"{folder}: has no journal.jsonl; `coda sync` takes the folder of a run, or a folder of runs"
        )
    return sum(_sync_run(run, list(overrides)) for run in runs)


def _sync_run(folder: Path, overrides: list[str]) -> int:
    # the folder may have been moved
    recipe = replace(load_stored(folder, overrides), runs=str(folder.parent))
    check_uri(recipe)
    if not is_open(folder / JOURNAL):
        _note_death(folder / JOURNAL)
    sent = 0
    try:
        for lines in tqdm(
            Sender(recipe, folder).send(), desc=f"sync {folder.name}", unit=" batches", disable=None
        ):
            sent += lines
    except store_errors() as error:
        raise UserError(
            f"{folder}: MLflow took {sent} lines, then failed; sync again later: {error!r:.300}"
        ) from error
    return sent


def _note_death(path: Path) -> None:
    if not path.read_bytes().endswith(b"\n"):
        # a copy that was made while the run wrote: the rest may still come
        return
    journal = Journal(path)
    if (
        journal.known["status"].get("status") == "RUNNING"
        and journal.known["tag"].get("host") == os.uname().nodename
    ):
        journal.append("status", {"status": "KILLED"}, timestamp=journal.last_time)
    journal.close()


def check_uri(recipe: Recipe) -> None:
    """Raises UserError: a tracking URI that MLflow does not take, or that would store a password
    with the run.
    """
    uri = recipe.tracking_uri
    if not URI.fullmatch(uri):
        valid = (
            "sqlite:///FILE, http(s)://HOST:PORT, or a postgresql://, mysql:// or mssql:// address"
        )
        raise UserError(f"tracking.uri is {uri!r}; it must be {valid}")
    if (shown := re.sub(r"(://[^/@]*):[^/@]*@", r"\1:...@", uri, count=1)) != uri:
        places = "~/.pgpass (PostgreSQL), or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or ~/.mlflow/credentials (http)"
        raise UserError(
            f"tracking.uri {shown} holds a password, which every run would store: put it into {places}"
        )


def mlflow_client(uri: str) -> "MlflowClient":
    """A quiet client that gives up early instead of after minutes; makes the folder of an SQLite
    file.
    """
    # a retry inside could create a run twice; the sender itself tries again
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    # seconds
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    # compute nodes have no way out
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if database := sqlite_file(uri):
        database.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(uri, uri)


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow's client raises where a store cannot be reached, or refuses something."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, RequestException, SQLAlchemyError


def sqlite_file(uri: str) -> Path | None:
    """The database file that ``uri`` names, if it names one."""
    match = URI.fullmatch(uri)
    return Path(match["file"]).resolve() if match and match["file"] else None


def _experiment(client: "MlflowClient", recipe: Recipe) -> str:
    """Id of the recipe's experiment, which is created if it is not there."""
    from mlflow.exceptions import MlflowException

    name, database = recipe.tracking.experiment, sqlite_file(recipe.tracking_uri)
    if not client.get_experiment_by_name(name):
        try:
            # Without a location, artifacts of an SQLite store would land in the current directory.
            client.create_experiment(
                name, (database.parent / "mlartifacts" / name).as_uri() if database else None
            )
        except MlflowException as error:
            # another training was quicker
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    found = client.get_experiment_by_name(name)
    if found is None:
        raise MlflowException(f"experiment {name!r} is gone")
    return found.experiment_id


def _sole_run(
    client: "MlflowClient",
    experiment: str,
    tag: str,
    value: str,
    create: Callable[[], None],
    known: str | None = None,
) -> "Run":
    """The run with this tag, created if there is none. Of several, as when an answer was lost, the
    known or the first stays.
    """
    wanted = f"tags.`{tag}` = '{value}'"
    if not client.search_runs([experiment], wanted, max_results=1):
        create()
    found = client.search_runs([experiment], wanted)
    first, *others = sorted(
        found, key=lambda run: (run.info.run_id != known, run.info.start_time, run.info.run_id)
    )
    for run in others:
        client.delete_run(run.info.run_id)
    return first


def _batches(lines: Iterable[bytes]) -> Iterator[tuple[str, list[dict[str, Any]], int]]:
    """(kind, records, bytes) of consecutive lines of one kind, at most as many as MLflow takes at
    once.
    """
    # the last may be half written
    entries = ((json.loads(line), len(line)) for line in lines if line.endswith(b"\n"))
    for kind, group in itertools.groupby(entries, key=lambda entry: entry[0]["kind"]):
        while batch := list(itertools.islice(group, _LIMITS[kind])):
            yield kind, [record for record, _ in batch], sum(size for _, size in batch)


def _stored(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
