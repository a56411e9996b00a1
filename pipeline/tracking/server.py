"""``coda serve``: start MLflow's own server as it should be for one machine, or for a team.

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
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import network_file_system, write_atomically
from pipeline.tracking.store import sqlite_file

# The file in which MLflow's clients look for name and password, too.
CREDENTIALS_FILE = Path("~/.mlflow/credentials")
# The command that makes it.
MAKE_CREDENTIALS = (
    "mkdir -p ~/.mlflow; (umask 077; printf '[mlflow]\\n"
    "mlflow_tracking_username = coda\\nmlflow_tracking_password = %s\\n' "
    '"$(openssl rand -hex 16)" > ~/.mlflow/credentials)'
)
# Scheme or feature -> (module, package to install).
_NEEDED = {
    "postgresql": ("psycopg", "psycopg[binary]"),
    "s3": ("boto3", "boto3"),
    "auth": ("flask_wtf", "Flask-WTF"),
}


@dataclass(frozen=True)
class Server:
    """The options of a server: what it serves, and where it listens."""

    runs: Path
    """Folder of runs.

    Its mlflow.db and mlartifacts are served if nothing else is named; the server's own files go
    there.
    """
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 5000
    """Port to listen on."""
    store: str | None = None
    """Database URI."""
    artifacts: str | None = None
    """Folder or s3:// URI."""
    names: tuple[str, ...] = ()
    """Further host names by which clients reach the server."""
    credentials: Path | None = None
    """File of mode 600 with name and password.

    None: no password on this machine, CREDENTIALS_FILE for a server that others can reach.
    """


def serve(server: Server) -> None:
    """Become MLflow's server; does not return.

    Raises:
        UserError: as ``command`` does, or the database or the port cannot be used.
    """
    words, environment = command(server)
    _check_database(environment["MLFLOW_BACKEND_STORE_URI"])
    host, port = server.host, server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        # The address is taken, unknown or forbidden, or the number is not a port.
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{host} port {port}: {reason}; choose another with --host and --port"
        ) from error
    name = host if _is_local(host) else socket.getfqdn()
    address = f"http://{name}:{port}"
    print(f"MLflow: {address} (for recipes: tracking.uri={address})", flush=True)
    os.execve(words[0], words, os.environ | environment)


def command(server: Server) -> tuple[list[str], dict[str, str]]:
    """The command that starts MLflow's server: its words, and environment variables.

    Raises:
        UserError: an SQLite file on a network file system, a missing driver, or no safe credentials
            where they are needed.
    """
    runs, host, port = server.runs.resolve(), server.host, server.port
    store = server.store or f"sqlite:///{runs / 'mlflow.db'}"
    artifacts = server.artifacts or str(runs / "mlartifacts")
    private = server.credentials is not None or not _is_local(host)
    _check_modules(store, artifacts, private)
    database = sqlite_file(store)
    if database and (kind := network_file_system(database.parent)):
        raise UserError(
            f"{database}: lies on {kind}, where SQLite's locks are not safe; "
            "name a file on a disk of this machine, or a PostgreSQL database, "
            "with --backend-store-uri"
        )
    (database.parent if database else runs).mkdir(parents=True, exist_ok=True)
    words = [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", host, "--port", str(port)),
        *("--artifacts-destination", artifacts),
    ]
    # The number of processes that answer.
    if "MLFLOW_WORKERS" not in os.environ:
        words += ["--workers", "1" if database else "4"]
    environment = {
        # Not an argument: it may hold a password, and everybody sees arguments.
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Set here, whatever the environment says.
        "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false",
        # It serves language models only, and would cost several processes.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    if private:
        words += ["--app-name", "basic-auth"]
        credentials = (server.credentials or CREDENTIALS_FILE).expanduser()
        environment |= _authentication(runs / "mlflow-auth", credentials)
    if not _is_local(host):
        words += _allowed_names(_own_names(host, server.names), port)
    return words, environment


def _check_modules(store: str, artifacts: str, private: bool) -> None:
    """Check that the Python modules which the server needs are installed."""
    uses = [store.partition(":")[0], artifacts.partition(":")[0]]
    for use in [*uses, "auth"] if private else uses:
        if use not in _NEEDED:
            continue
        module, package = _NEEDED[use]
        if not find_spec(module):
            raise UserError(
                f"a server with {use} needs the Python module {module}: pip install '{package}'"
            )


def _allowed_names(names: list[str], port: int) -> list[str]:
    """The options that let clients call the server by ``names``."""
    hosts = [f"{name}{ending}" for name in names for ending in ("", f":{port}")]
    # The pages post to their own server, which counts as another origin wherever it is not called
    # localhost.
    origins = []
    for name in names:
        origins += [f"http://{name}:{port}", f"https://{name}"]
    return ["--allowed-hosts", ",".join(hosts), "--cors-allowed-origins", ",".join(origins)]


def _authentication(folder: Path, credentials: Path) -> dict[str, str]:
    """Variables of the basic-auth app, whose users and keys are kept in ``folder``."""
    name, password = read_credentials(credentials)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    key = folder / "secret_key"
    if not key.is_file():
        write_atomically(key, secrets.token_hex(32).encode())
    settings = {
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        "admin_username": name,
        "database_uri": f"sqlite:///{folder / 'users.db'}",
        "default_permission": "READ",
        # Every request brings the password, and checking one takes tens of milliseconds: an answer
        # is good for a minute.
        "auth_cache_ttl_seconds": "60",
    }
    lines = ["[mlflow]", *(f"{option} = {value}" for option, value in settings.items())]
    write_atomically(folder / "basic_auth.ini", ("\n".join(lines) + "\n").encode())
    chosen_key = os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY")
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": name,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": chosen_key or key.read_text(encoding="utf-8"),
    }


def read_credentials(path: Path) -> tuple[str, str]:
    """Read (name, password) from a file, as MLflow's clients do.

    Raises:
        UserError: there is no such file, others may read it, or it lacks name or password.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise UserError(
                f"{path}: has mode {mode:o}, so others may read the password in it: "
                f"chmod 600 {path}"
            )
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(path.read_text(encoding="utf-8"))
        section: Mapping[str, str] = parser["mlflow"]
        return section["mlflow_tracking_username"], section["mlflow_tracking_password"]
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; a server that others can reach needs a password: "
            f"{MAKE_CREDENTIALS}"
        ) from error
    except (KeyError, configparser.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: must hold [mlflow], mlflow_tracking_username and mlflow_tracking_password: "
            f"{MAKE_CREDENTIALS}"
        ) from error


def _own_names(host: str, names: Iterable[str]) -> list[str]:
    """The names and addresses by which clients may call this machine, each once."""
    name = socket.gethostname()
    known = ["localhost", "127.0.0.1", "[::1]"]
    known += [name, name.partition(".")[0], socket.getfqdn(), *names]
    # A machine may not know its own name.
    with suppress(OSError):
        known += [str(found[4][0]) for found in socket.getaddrinfo(name, None)]
    if not _is_any(host):
        known.append(host)
    return list(dict.fromkeys(map(_in_brackets, known)))


def _in_brackets(name: str) -> str:
    """An IPv6 address in the brackets that it has in a URL; any other name unchanged."""
    return f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_any(host: str) -> bool:
    return host in ("0.0.0.0", "::")


def _check_database(uri: str) -> None:
    """Check that the database can be opened, which MLflow's server would report in many lines."""
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri)
        engine.connect().close()
        engine.dispose()
    except sqlalchemy.exc.SQLAlchemyError as error:
        # There is no such file, host, database or user.
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise UserError(
            f"--backend-store-uri {uri.rpartition('@')[2]}: cannot be opened: {reason}"
        ) from error
