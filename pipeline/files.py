"""Files that are either complete or absent, and the file systems that they lie on."""

import os
from pathlib import Path

NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs", "9p")  # SQLite's locks are not safe there


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` under a temporary name, sync it to disk and rename; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def network_file_system(folder: Path) -> str | None:
    """Type of the file system that holds ``folder``, which need not exist, if it is one of a network: nfs4, lustre, ..."""
    kind = file_system(folder)
    return kind if kind in NETWORK_FILE_SYSTEMS else None


def file_system(folder: Path) -> str:
    """Type of the file system that holds ``folder``, such as ext4 or nfs4."""
    folder = folder.resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    return max((len(point), kind) for point, kind in mounts if folder.is_relative_to(point))[1]


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
