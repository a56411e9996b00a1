"""A small fuzz campaign of 304 mutated files; `make fuzz` reads 2,000."""

import os
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).with_name("fuzz.py")


def test_mutated_files_never_hang_crash_or_pass_unnoticed():
    """The campaign has a process of its own, as it forks and other tests leave threads behind."""
    paths = os.pathsep.join(map(str, (FUZZ.parents[2], FUZZ.parent)))
    command = [sys.executable, FUZZ, "--files", "304", "--seed", "1"]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *kinds, last = done.stdout.splitlines()
    assert last.startswith("304 mutated files")
    assert len(kinds) == 8
    assert all(": 38 files" in line for line in kinds)
    refused = {line.partition(":")[0]: "refused" in line for line in kinds}
    assert all(refused[kind] for kind in ("image", ".beton", "manifest", "tar", "shard", "csv"))
