"""Files that are either complete or absent, and the file systems that they lie on."""

import errno
import hashlib
import os
import re
from pathlib import Path

# There is no room on the disk, or none left in a quota.
FULL = {errno.ENOSPC, errno.EDQUOT}
# Only a disk has these errors, and it may be well again when the job script tries once more.
FAILING = {errno.EIO, errno.ESTALE, errno.EREMOTEIO}
# The network has these errors, too. With a file's name they are of a disk on the network.
AWAY = {errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ESHUTDOWN}
# The path does not exist, is not allowed or cannot be what it should: trying again changes nothing.
PATH = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EXDEV,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
}

# SQLite's locks are not safe on these.
NETWORK_FILE_SYSTEMS = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ncpfs", "9p", "ceph", "glusterfs"),
    *("lustre", "gpfs", "beegfs", "wekafs", "panfs", "orangefs", "pvfs2", "cvfs", "dvs"),
    *("fuse.sshfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.glusterfs", "fuse.beegfs"),
    *("fuse.lustre", "fuse.orangefs", "fuse.quobyte", "fuse.mfs", "fuse.moosefs"),
    *("fuse.lizardfs", "fuse.saunafs", "fuse.seaweedfs", "fuse.juicefs", "fuse.xtreemfs"),
    *("fuse.dfuse", "fuse.daos", "fuse.s3fs", "fuse.goofys", "fuse.mount-s3"),
    *("fuse.geesefs", "fuse.rclone", "fuse.gcsfuse", "fuse.blobfuse", "fuse.blobfuse2"),
    *("fuse.cvmfs2", "fuse.davfs", "fuse.curlftpfs", "fuse.smbnetfs", "fuse.hdfs"),
    *("fuse.fuse_dfs", "fuse.alluxio-fuse"),
)
# The kernel's table of mounts, of this process.
MOUNTS = Path("/proc/self/mounts")
UNKNOWN_FILE_SYSTEM = "unknown"


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` under a temporary name, sync it to disk and rename it to ``path``.

    The folder is made if it is not there.
    """
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
    """Type of the file system that holds ``folder``, if it is a network's: nfs4, lustre, ...

    The folder need not exist.
    """
    kind = file_system(folder)
    return kind if kind in NETWORK_FILE_SYSTEMS else None


def file_system(folder: Path) -> str:
    """Type of the file system that holds ``folder``, such as ext4 or nfs4.

    It is "unknown" where no mount is listed, as in a chroot. The folder need not exist.
    """
    place = Path(os.path.realpath(folder))
    kind = UNKNOWN_FILE_SYSTEM
    depth = -1
    try:
        lines = os.fsdecode(MOUNTS.read_bytes()).split("\n")
    except OSError:
        return UNKNOWN_FILE_SYSTEM
    for line in lines:
        if line.count(" ") < 2:
            continue
        _, point, found, *_ = line.split(" ")
        # A space is written as \040.
        mounted = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point))
        # Of two mounts at one point, the later hides the earlier.
        if place.is_relative_to(mounted) and len(mounted.parts) >= depth:
            kind, depth = found, len(mounted.parts)
    return kind


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
