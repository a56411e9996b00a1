"""The command by which `coda serve` starts MLflow's server, and what it refuses to start."""

import os
import socket
import sys

import pytest

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.tracking import server
from pipeline.tracking.server import Server, command


@pytest.fixture
def credentials(tmp_path):
    path = tmp_path / "credentials"
    path.write_text(
        "[mlflow]\nmlflow_tracking_username = coda\nmlflow_tracking_password = 100% secret\n"
    )
    path.chmod(0o600)
    return path


def value(words, option):
    return words[words.index(option) + 1]


def test_one_machine_needs_no_options(tmp_path):
    words, environment = command(Server(tmp_path / "runs"))
    assert words[:4] == [sys.executable, "-m", "mlflow", "server"]
    assert (value(words, "--host"), value(words, "--port")) == ("127.0.0.1", "5000")
    assert environment["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    assert value(words, "--artifacts-destination") == str(tmp_path / "runs" / "mlartifacts")
    assert "--app-name" not in words
    assert "--allowed-hosts" not in words
    assert not (tmp_path / "runs" / "mlflow-auth").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_security_middleware_stays_on(tmp_path, credentials, host):
    words, environment = command(Server(tmp_path, host, credentials=credentials))
    assert not any("disable" in word for word in words)
    assert environment["MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE"] == "false"
    assert "*" not in "".join(words)


def test_beyond_this_machine_it_has_a_password_and_answers_to_its_names(tmp_path, credentials):
    words, environment = command(
        Server(tmp_path, "0.0.0.0", 5001, names=("mlflow.lab",), credentials=credentials)
    )
    assert value(words, "--app-name") == "basic-auth"
    hosts, name = value(words, "--allowed-hosts").split(","), socket.gethostname()
    assert {
        name,
        f"{name}:5001",
        socket.getfqdn(),
        f"{socket.getfqdn()}:5001",
        "mlflow.lab",
        "mlflow.lab:5001",
    } <= set(hosts)
    assert {f"http://{name}:5001", "https://mlflow.lab"} <= set(
        value(words, "--cors-allowed-origins").split(",")
    )
    assert (
        environment["MLFLOW_AUTH_ADMIN_USERNAME"],
        environment["MLFLOW_AUTH_ADMIN_PASSWORD"],
    ) == ("coda", "100% secret")
    assert not any("secret" in word for word in words), "everybody sees a process's arguments"
    key = environment["MLFLOW_FLASK_SERVER_SECRET_KEY"]
    assert len(key) == 64
    assert (
        command(Server(tmp_path, "0.0.0.0", credentials=credentials))[1][
            "MLFLOW_FLASK_SERVER_SECRET_KEY"
        ]
        == key
    )
    assert (tmp_path / "mlflow-auth").stat().st_mode & 0o777 == 0o700


def test_without_safe_credentials_it_does_not_start_beyond_this_machine(
    tmp_path, credentials, monkeypatch, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main(["serve", "--runs", str(tmp_path), "--host", "0.0.0.0"]) == 2
    said = capsys.readouterr().err
    assert "home/.mlflow/credentials: No such file or directory; a server that others" in said
    assert "can reach needs a password" in said
    credentials.chmod(0o640)
    with pytest.raises(UserError, match="has mode 640, so others may read"):
        command(Server(tmp_path, "0.0.0.0", credentials=credentials))
    credentials.write_text("password\n")
    credentials.chmod(0o600)
    with pytest.raises(UserError, match=r"must hold \[mlflow\], mlflow_tracking_username"):
        command(Server(tmp_path, "0.0.0.0", credentials=credentials))


def test_sqlite_on_a_network_file_system_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "network_file_system", lambda folder: "nfs4")
    with pytest.raises(UserError, match="lies on nfs4, where SQLite's locks are not safe"):
        command(Server(tmp_path))
    command(Server(tmp_path, store="postgresql://coda@db/mlflow"))


def test_what_cannot_be_used_is_one_clear_line(tmp_path, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--runs", str(tmp_path), "--port", str(port)]) == 2
        assert (
            "Address already in use; choose another with --host and --port"
            in capsys.readouterr().err
        )
        assert main(["serve", "--runs", str(tmp_path), "--port", "70000"]) == 2
        assert "port 70000: " in capsys.readouterr().err
    database = f"postgresql://coda:secret@127.0.0.1:{port}/mlflow"
    assert main(["serve", "--runs", str(tmp_path), "--backend-store-uri", database]) == 2
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port}/mlflow: cannot be opened: " in said
    assert "secret" not in said
    assert "Traceback" not in said
    monkeypatch.setattr(server, "find_spec", lambda name: None if name == "boto3" else name)
    with pytest.raises(UserError, match="module boto3: pip install 'boto3'"):
        command(Server(tmp_path, artifacts="s3://bucket/mlflow"))
    assert "mlflow" in os.listdir(tmp_path)[0]
