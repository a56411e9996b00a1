"""A bare machine made of this one.

It is a mount and network namespace without compilers, ninja, a writable home, or a network.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

TOOLS = (
    "ninja",
    "cc",
    "c++",
    "gcc*",
    "g++*",
    "cpp*",
    "clang*",
    "*-linux-gnu-*",
    "as",
    "ld",
    "ld.bfd",
    "ld.gold",
    "ld.lld",
    "pkg-config",
    "nvcc",
)
# Folders that hold cc1 and other parts of compilers.
COMPILERS = ("/usr/lib/gcc", "/usr/libexec/gcc")
OF_FFCV = ("libopencv_*", "libturbojpeg*")
LOOPBACK_UP = """
import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 0x41))
"""
SCRIPT = """set -e
for file in $HIDDEN; do mount --bind /dev/null "$file"; done
for folder in $EMPTIED; do mount -t tmpfs -o ro none "$folder"; done
"$PYTHON" -c "$LOOPBACK_UP"
unset HIDDEN EMPTIED LOOPBACK_UP
exec "$@"
"""


def namespaces() -> list[str]:
    """The words that start a command in namespaces of its own.

    There are none where this machine does not allow that.
    """
    for words in (
        ["unshare", "--mount", "--net"],
        ["unshare", "--map-root-user", "--mount", "--net"],
    ):
        probe = [*words, "sh", "-c", "mount -t tmpfs none /mnt"]
        if shutil.which("unshare") and subprocess.run(probe, capture_output=True).returncode == 0:
            return words
    return []


def run(
    command: list[str], folder: Path, *, up: bool = True, **variables: str
) -> subprocess.CompletedProcess:
    """Run a command on the bare machine.

    Args:
        command: its words.
        folder: its home, empty and read-only, and its temporary folder are made in it.
        up: whether the loopback interface works.
        **variables: further environment variables, such as another HOME.
    """
    home, temporary = folder / "home", folder / "tmp"
    for path in (home, temporary):
        path.mkdir(exist_ok=True)
    places = [*os.environ["PATH"].split(":"), str(Path(sys.executable).parent)]
    found = [
        path for place in places for pattern in TOOLS for path in Path(place).glob(pattern)
    ] + _libraries()
    hidden = sorted({str(path.resolve()) for path in found if path.resolve().is_file()})
    environment = {
        **{name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH") if name in os.environ},
        "HIDDEN": " ".join(hidden),
        "EMPTIED": " ".join([str(home), *filter(os.path.isdir, COMPILERS)]),
        "PYTHON": sys.executable,
        "LOOPBACK_UP": LOOPBACK_UP if up else "",
        "OMP_NUM_THREADS": "1",
        "HOME": str(home),
        "TMPDIR": str(temporary),
        **variables,
    }
    words = [*namespaces(), "sh", "-c", SCRIPT, "sh", *command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500)


def _libraries() -> list[Path]:
    """libgomp, and OpenCV and libjpeg-turbo of the system unless FFCV was built to need them."""
    spec = find_spec("ffcv")
    built = list(Path(str(spec and spec.origin)).parent.glob("_libffcv*.so"))
    needed = any(b"libopencv_imgproc.so" in file.read_bytes() for file in built)
    names = ("libgomp*", *(() if needed else OF_FFCV))
    folders = list(Path("/usr/lib").glob("*-linux-gnu"))
    return [path for place in folders for name in names for path in place.glob(name)]
