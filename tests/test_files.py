"""The file system on which a folder lies, from mount tables as real machines have them."""

import pytest

from pipeline import files
from pipeline.files import file_system, network_file_system

TABLE = r"""
overlay / overlay rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/local ext4 rw 0 0
auto.scratch /scratch autofs rw 0 0
weka /scratch wekafs rw 0 0
server:/a /mnt/two\040words\134x nfs rw 0 0
sshfs#host: /mnt/ssh fuse.sshfs rw 0 0
/dev/sdc1 /mnt/ntfs fuseblk rw 0 0
panfs://x /mnt/größe panfs rw 0 0
broken
"""


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOUNTS", tmp_path / "mounts")
    return tmp_path / "mounts"


@pytest.mark.parametrize(
    ("folder", "kind", "network"),
    [
        ("/", "overlay", False),
        ("/homework", "overlay", False),
        ("/home/me/runs", "nfs4", True),
        ("/home/local/runs", "ext4", False),
        # The later of two mounts at one point hides the earlier.
        ("/scratch/me", "wekafs", True),
        ("/mnt/two words\\x/runs", "nfs", True),
        ("/mnt/ssh", "fuse.sshfs", True),
        ("/mnt/ntfs", "fuseblk", False),
        ("/mnt/größe/runs", "panfs", True),
    ],
)
def test_the_nearest_mount_decides(mounts, folder, kind, network):
    mounts.write_text(TABLE, encoding="utf-8")
    assert file_system(folder) == kind
    assert network_file_system(folder) == (kind if network else None)


@pytest.mark.parametrize(
    "content", [None, b"", b"\n", b"proc /proc proc rw 0 0\n", b"\xff\xfe / \n", b"a b\n"]
)
def test_a_chroot_without_its_root_is_unknown(mounts, tmp_path, content):
    if content is not None:
        mounts.write_bytes(content)
    assert file_system(tmp_path) in ("unknown", "")
    assert network_file_system(tmp_path) is None


def test_this_machine(tmp_path):
    assert file_system(tmp_path / "not" / "there") == file_system(tmp_path)
