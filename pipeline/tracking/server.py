"""``coda serve``: MLflow's own server, started as it should be for one machine, or for a team.

Runs of one machine need no options: an SQLite file and artifacts beside it, seen from this machine
only. A server that others can reach asks for a password (MLflow's basic-auth app), and answers only
to its own names (protection against DNS rebinding).
"""

import configparser
import ipaddress
import os
import secrets
import socket
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import network_file_system, write_atomically
from pipeline.tracking.store import sqlite_file

# where MLflow's clients look, too
CREDENTIALS = Path("~/.mlflow/credentials")
MAKE_CREDENTIALS = (
    "mkdir -p ~/.mlflow; (umask 077; printf '[mlflow]\\nmlflow_tracking_username = coda\\nmlflow_tracking_password = %s\\n' "
    '"$(openssl rand -hex 16)" > ~/.mlflow/credentials)'
)
# module, package
_NEEDED = {
    "postgresql": ("psycopg", "psycopg[binary]"),
    "s3": ("boto3", "boto3"),
    "auth": ("flask_wtf", "Flask-WTF"),
}


@dataclass(frozen=True)
class Server:
    """Where and what to serve."""

    runs: Path
    """Folder of runs, whose mlflow.db and mlartifacts are served if nothing else is named; the
    server's own files go there.
    """
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 5000
    store: str | None = None
    """Database URI."""
    artifacts: str | None = None
    """Folder or s3:// URI."""
    names: tuple[str, ...] = ()
    """Further host names by which clients reach the server."""
    credentials: Path | None = None
    """File of mode 600 with name and password; None: none on this machine, CREDENTIALS beyond it.
    """


def serve(server: Server) -> None:
    """Become MLflow's server; does not return.

    Raises:
        UserError: as ``command`` does, or the database or the port cannot be used.
    """
    words, environment = command(server)
    _check_database(environment["MLFLOW_BACKEND_STORE_URI"])
    host, port = server.host, server.port
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        # taken, unknown, forbidden; no port at all
        raise UserError(
            f"{host} port {port}: {getattr(error, 'strerror', None) or error}; choose another with --host and --port"
        ) from error
    name = host if _is_local(host) else socket.getfqdn()
    print(
        f"MLflow: http://{name}:{port} (for recipes: tracking.uri=http://{name}:{port})", flush=True
    )
    os.execve(words[0], words, os.environ | environment)


def command(server: Server) -> tuple[list[str], dict[str, str]]:
    """The words of the command that starts MLflow's server, and the environment variables that it
    needs.

    Raises:
        UserError: an SQLite file on a network file system, a missing driver, or no safe credentials
            where they are needed.
    """
    runs, host, port = server.runs.resolve(), server.host, server.port
    store = server.store or f"sqlite:///{runs / 'mlflow.db'}"
    artifacts = server.artifacts or str(runs / "mlartifacts")
    private = server.credentials is not None or not _is_local(host)
    for use in (store.partition(":")[0], artifacts.partition(":")[0], "auth" if private else ""):
        module, package = _NEEDED.get(use, ("sys", ""))
        if not find_spec(module):
            raise UserError(
                f"a server with {use} needs the Python module {module}: pip install '{package}'"
            )
    database = sqlite_file(store)
    if database and (kind := network_file_system(database.parent)):
        remedy = "name a file on a disk of this machine, or a PostgreSQL database, with --backend-store-uri"
        raise UserError(f"{database}: lies on {kind}, where SQLite's locks are not safe; {remedy}")
    (database.parent if database else runs).mkdir(parents=True, exist_ok=True)
    words = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        host,
        "--port",
        str(port),
        "--artifacts-destination",
        artifacts,
    ]
    # processes that answer
    if "MLFLOW_WORKERS" not in os.environ:
        words += ["--workers", "1" if database else "4"]
    environment = {
        # not an argument: it may hold a password, and everybody sees arguments
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # whatever the environment says
        "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false",
        # for language models; it would cost several processes
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    if private:
        words += ["--app-name", "basic-auth"]
        environment |= _authentication(
            runs / "mlflow-auth", (server.credentials or CREDENTIALS).expanduser()
        )
    if not _is_local(host):
        known = _own_names(host, server.names)
        words += [
            "--allowed-hosts",
            ",".join(f"{name}{ending}" for name in known for ending in ("", f":{port}")),
        ]
        # The pages post to their own server, which counts as another origin wherever it is not
        # called localhost.
        origins = [
            f"{scheme}://{name}{ending}"
            for name in known
            for scheme, ending in (("http", f":{port}"), ("https", ""))
        ]
        words += ["--cors-allowed-origins", ",".join(origins)]
    return words, environment


def _authentication(folder: Path, credentials: Path) -> dict[str, str]:
    """Variables of the basic-auth app, whose users and keys are kept in ``folder``."""
    name, password = read_credentials(credentials)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    key = folder / "secret_key"
    if not key.is_file():
        write_atomically(key, secrets.token_hex(32).encode())
    defaults = f"authorization_function = mlflow.server.auth:authenticate_request_basic_auth\nadmin_username = {name}\n"
    # Every request brings the password, whose check takes tens of milliseconds: an answer is good
    # for a minute.
    defaults += f"database_uri = sqlite:///{folder / 'users.db'}\ndefault_permission = READ\nauth_cache_ttl_seconds = 60\n"
    write_atomically(folder / "basic_auth.ini", f"[mlflow]\n{defaults}".encode())
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": name,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY")
        or key.read_text(encoding="utf-8"),
    }


def read_credentials(path: Path) -> tuple[str, str]:
    """(name, password) of a file as MLflow's clients read it.

    Raises:
        UserError: no such file, one that others may read, or one without name and password.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise UserError(
                f"{path}: has mode {mode:o}, so others may read the password in it: chmod 600 {path}"
            )
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(path.read_text(encoding="utf-8"))
        section: Mapping[str, str] = parser["mlflow"]
        return section["mlflow_tracking_username"], section["mlflow_tracking_password"]
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; a server that others can reach needs a password: {MAKE_CREDENTIALS}"
        ) from error
    except (KeyError, configparser.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: must hold [mlflow], mlflow_tracking_username and mlflow_tracking_password: {MAKE_CREDENTIALS}"
        ) from error


def _own_names(host: str, names: Iterable[str]) -> list[str]:
    """By which clients may call this machine."""
    name = socket.gethostname()
    known = [
        "localhost",
        "127.0.0.1",
        "[::1]",
        name,
        name.partition(".")[0],
        socket.getfqdn(),
        *names,
    ]
    try:
        known += [str(found[4][0]) for found in socket.getaddrinfo(name, None)]
    except OSError:
        # a machine that does not know its own name
        pass
    if not _is_any(host):
        known.append(f"[{host}]" if ":" in host else host)
    return list(
        dict.fromkeys(
            f"[{name}]" if name.count(":") > 1 and name[0] != "[" else name for name in known
        )
    )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_any(host: str) -> bool:
    return host in ("0.0.0.0", "::")


def _check_database(uri: str) -> None:
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri)
        engine.connect().close()
        engine.dispose()
    except sqlalchemy.exc.SQLAlchemyError as error:
        # no such file, host, database or user
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise UserError(
            f"--backend-store-uri {uri.rpartition('@')[2]}: cannot be opened: {reason}"
        ) from error
