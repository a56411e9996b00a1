"""The doctor's check of an MLflow address: each failure is found and answered."""

import http.server
import sqlite3
import threading
import time
from contextlib import contextmanager

import pytest
from processes import free_port

from pipeline.doctor import machine, mlflow_probes, remedies
from pipeline.doctor.remedies import Surroundings
from pipeline.tracking.store import mlflow_client


@contextmanager
def server(status):
    """Address of a server that answers everything with ``status``.

    With None it takes connections and says nothing.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if status is None:
                stop.wait(30)
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"go away")

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    stop = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            stop.set()
            running.shutdown()
            thread.join()


@pytest.fixture
def track(monkeypatch):
    """The tracking check, which has two seconds: address -> what it says."""
    monkeypatch.setattr(mlflow_probes, "ADDRESS_SECONDS", 2)
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        # The check sets them; they are restored afterwards.
        monkeypatch.setenv(name, "7")

    def track(uri, name="tracking.uri"):
        start = time.monotonic()
        try:
            return f"ok: {mlflow_probes.tracking(name, uri)}"
        except Exception as error:
            return machine.without_passwords(machine.one_line(error))
        finally:
            assert time.monotonic() - start < 20

    # This imports MLflow, which is not to be timed.
    mlflow_client("http://127.0.0.1:1")
    return track


REMEDY = remedies.remedies(Surroundings())


@pytest.mark.parametrize(
    ("status", "words", "remedy"),
    [
        (403, "403", "MLFLOW_TRACKING_USERNAME"),
        (500, "500", "coda serve"),
        (None, "timed out", "coda serve"),
    ],
)
def test_tracking_server_that_refuses_fails_or_hangs(track, status, words, remedy):
    with server(status) as address:
        found = track(address)
    assert not found.startswith("ok")
    assert words in found.lower()
    assert remedy in REMEDY("tracking.uri", found)


def test_tracking_address_that_nobody_answers(track):
    found = track(f"http://127.0.0.1:{free_port()}")
    assert not found.startswith("ok")
    assert "refused" in found.lower()
    assert "`coda sync` sends what is missing" in REMEDY("tracking.uri", found)


def test_something_else_than_mlflow_answers(track):
    with server(200) as address:
        assert not track(address).startswith("ok")


@pytest.mark.parametrize("name", ["tracking.uri", "MLFLOW_TRACKING_URI"])
@pytest.mark.parametrize(
    "uri",
    [
        "http://me:hunter/2@127.0.0.1:1",
        "http://me:hunter%202@127.0.0.1:1",
        "postgresql+psycopg://me:hunter2@127.0.0.1:1/x",
    ],
)
def test_no_password_is_printed(track, uri, name):
    found = track(uri, name)
    assert not found.startswith("ok")
    assert "hunter" not in found


def test_sqlite_address(track, tmp_path):
    assert track(f"sqlite:///{tmp_path}/new/mlflow.db").startswith(
        f"ok: sqlite file {tmp_path}/new/mlflow.db: {tmp_path} ("
    )
    assert not (tmp_path / "new").exists()
    assert "sqlite" in REMEDY("tracking.uri", f"sqlite:///{tmp_path}")
    assert "Error" in track("sqlite:////proc/mlflow.db")
    database = tmp_path / "mlflow.db"
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("CREATE TABLE runs (id)")
    assert track(f"sqlite:///{database}").startswith("ok: ")
    holder.execute("BEGIN EXCLUSIVE")
    assert "database is locked" in track(f"sqlite:///{database}")
    holder.close()


def test_mlflows_variable_is_looked_at_and_said_to_be_unread(track, tmp_path, monkeypatch):
    assert track(f"sqlite:///{tmp_path}/mlflow.db", "MLFLOW_TRACKING_URI").endswith(
        "no training run reads this variable: recipes have tracking.uri"
    )
    assert track("databricks", "MLFLOW_TRACKING_URI").startswith(
        "ok: 'databricks' is not an address that is tried here"
    )
    assert machine.tracking_variable() == {}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert machine.tracking_variable() == {"MLFLOW_TRACKING_URI": "http://server:5000"}
