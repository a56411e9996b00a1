"""MLflow's stores: their addresses, their client, and the runs that are found in them by a tag."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

TRACKING_URI = re.compile(
    r"sqlite:///(?P<file>.+)|(https?|(postgresql|mysql|mssql)(\+\w+)?)://[^/]+.*"
)


def check_uri(uri: str) -> None:
    """Check a tracking URI.

    Raises:
        UserError: MLflow does not take it, or it would store a password with the run.
    """
    if not TRACKING_URI.fullmatch(uri):
        raise UserError(
            f"tracking.uri is {uri!r}; it must be sqlite:///FILE, http(s)://HOST:PORT, "
            "or a postgresql://, mysql:// or mssql:// address"
        )
    shown = re.sub(r"(://[^/@]*):[^/@]*@", r"\1:...@", uri, count=1)
    if shown != uri:
        raise UserError(
            f"tracking.uri {shown} holds a password, which every run would store: put it into "
            "~/.pgpass (PostgreSQL), or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
            "or ~/.mlflow/credentials (http)"
        )


def sqlite_file(uri: str) -> Path | None:
    """The database file that ``uri`` names, if it names one."""
    match = TRACKING_URI.fullmatch(uri)
    return Path(match["file"]).resolve() if match and match["file"] else None


def mlflow_client(uri: str) -> "MlflowClient":
    """A quiet client that gives up after seconds; makes the folder of an SQLite file."""
    # A retry inside the client could create a run twice; the sender itself tries again.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    # In seconds.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    # Compute nodes often cannot reach the internet.
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
    """The exceptions of MLflow's client where a store cannot be reached or refuses something."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, RequestException, SQLAlchemyError


def experiment_id(client: "MlflowClient", name: str, uri: str) -> str:
    """Id of the experiment ``name`` in the store at ``uri``; created if it is not there."""
    from mlflow.exceptions import MlflowException

    database = sqlite_file(uri)
    # Without a location, artifacts of an SQLite store would land in the current directory.
    location = (database.parent / "mlartifacts" / name).as_uri() if database else None
    if not client.get_experiment_by_name(name):
        try:
            client.create_experiment(name, location)
        except MlflowException as error:
            # Another run may have been quicker.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    found = client.get_experiment_by_name(name)
    if found is None:
        raise MlflowException(f"experiment {name!r} is gone")
    return str(found.experiment_id)


def sole_run(
    client: "MlflowClient",
    experiment: str,
    tag: str,
    value: str,
    create: Callable[[], None],
    known: str | None = None,
) -> "Run":
    """The one run of an experiment that has a tag, created if there is none.

    Several are there when an answer was lost, or when jobs created it at the same time: the known
    one, else the oldest, stays, and the others are deleted.

    Args:
        client: of the store.
        experiment: its id.
        tag: name of the tag.
        value: of the tag.
        create: creates the run.
        known: id of the run that stays.
    """
    wanted = f"tags.`{tag}` = '{value}'"
    if not client.search_runs([experiment], wanted, max_results=1):
        create()
    found: list[Run] = client.search_runs([experiment], wanted)
    first, *others = sorted(
        found, key=lambda run: (run.info.run_id != known, run.info.start_time, run.info.run_id)
    )
    for run in others:
        client.delete_run(run.info.run_id)
    return first
