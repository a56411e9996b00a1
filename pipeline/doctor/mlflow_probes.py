"""Probes of MLflow: a run in a file, and the address at which runs are tracked."""

import contextlib
import importlib.metadata
import os
import sqlite3
import tempfile
from pathlib import Path

from pipeline.doctor import machine

# For which an address has to answer.
ADDRESS_SECONDS = 10


def mlflow(folder: Path) -> str:
    """A run with one metric is written to an SQLite file in ``folder``, and read again.

    The folder is on the disk of the runs, as locks depend on the file system.
    """
    from pipeline.tracking.store import mlflow_client

    with tempfile.TemporaryDirectory(prefix=".coda-doctor-", dir=folder) as temporary:
        client = mlflow_client(f"sqlite:///{temporary}/mlflow.db")
        run = client.create_run(client.create_experiment("doctor", temporary)).info.run_id
        client.log_metric(run, "val/top1", 0.5, step=1, synchronous=True)
        history = client.get_metric_history(run, "val/top1")
        ((value, step),) = [(row.value, row.step) for row in history]
    if (value, step) != (0.5, 1):
        raise RuntimeError(f"logged 0.5 at step 1, read {value} at step {step}")
    return f"{importlib.metadata.version('mlflow')}, a run in SQLite in {folder} written and read"


def tracking(name: str, uri: str) -> str:
    """MLflow at ``uri`` answers, as far as that shows without writing there.

    Args:
        name: of the address: ``tracking.uri`` of a recipe, or MLflow's own variable.
        uri: the address.
    """
    # Set before mlflow_client, which gives the sender of a training run more time.
    os.environ |= {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(ADDRESS_SECONDS),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    from pipeline.tracking.store import TRACKING_URI, check_uri, mlflow_client, sqlite_file

    unread = "; no training run reads this variable: recipes have tracking.uri"
    if name == "tracking.uri":
        unread = ""
        check_uri(uri)
    if not TRACKING_URI.fullmatch(uri):
        return f"{uri!r} is not an address that is tried here{unread}"
    if database := sqlite_file(uri):
        return _sqlite(database) + unread
    if not uri.startswith("http"):
        return _database(uri) + unread
    mlflow_client(uri).search_experiments(max_results=1)
    return f"{uri} answers as MLflow{unread}"


def _sqlite(database: Path) -> str:
    """The file, or its folder, can be written, and locked."""
    found = machine.runs_folder(database.parent)
    if database.exists():
        with contextlib.closing(sqlite3.connect(database, timeout=ADDRESS_SECONDS)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
    return f"sqlite file {database}: {found}"


def _database(uri: str) -> str:
    """The database answers."""
    import sqlalchemy

    limit = {} if uri.startswith("mssql") else {"connect_timeout": ADDRESS_SECONDS}
    engine = sqlalchemy.create_engine(uri, connect_args=limit)
    try:
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT 1"))
    finally:
        engine.dispose()
    return f"{uri} answers"
