"""The memory that loaders take on a node, estimated and checked before the first batch is made.

Files are mapped, so pages that were read stay in the page cache as long as there is room, once for
all processes of a node.
"""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.beton import layout
from pipeline.data.epoch_loader import BATCHES_AHEAD
from pipeline.data.prepared import PreparedData
from pipeline.distributed import World, gather_across_ranks
from pipeline.errors import UserError
from pipeline.recipe.schema import Recipe

log = logging.getLogger(__name__)

TABLE_BYTES = 128
"""Bytes per stored image and loader: FFCV's tables (45), our copies (48), and an epoch's order."""


@dataclass(frozen=True)
class Memory:
    """The memory that loading takes on one node, in bytes."""

    per_process: int
    """Batches in flight, images being decoded, and tables."""
    processes: int
    """Processes on the node."""
    page_cache: int
    """For all processes together; the kernel gives it up where memory is short."""

    def __str__(self) -> str:
        total = self.per_process * self.processes
        return (
            f"{total / 1e9:.2f} GB ({self.processes} x {self.per_process / 1e9:.2f}), "
            f"and {self.page_cache / 1e9:.2f} GB of page cache"
        )


def estimate(recipe: Recipe, prepared: PreparedData, micro_batch: int, processes: int) -> Memory:
    """Estimate the memory that the loaders of ``processes`` processes on a node take."""
    data, manifest = recipe.data, prepared.manifest
    batches = ((micro_batch, data.image_size), (recipe.evaluation.batch_size, data.evaluated_size))
    in_flight = sum((BATCHES_AHEAD + 2) * count * size * size * 3 for count, size in batches)
    files = [prepared.original(name) for name in manifest.splits]
    pages, images = zip(*map(layout, files), strict=True)
    decoding = data.workers * sum(images)
    tables = sum(split.samples for split in manifest.splits.values()) * TABLE_BYTES
    cache = sum(split.bytes for split in manifest.splits.values())
    if data.shuffle_pages:
        cache = min(cache, 2 * data.shuffle_pages * max(pages))
    return Memory(in_flight + decoding + tables, processes, cache)


def check_memory(recipe: Recipe, prepared: PreparedData, world: World, micro_batch: int) -> None:
    """Check that every node has the memory that loading takes, and log it.

    Every process must call this before it makes loaders.

    Raises:
        UserError: a node has too little memory; raised on every process.
    """
    node = os.uname().nodename
    processes = gather_across_ranks(node).count(node)
    needed = estimate(recipe, prepared, micro_batch, processes)
    available = available_bytes()
    too_much = needed.per_process * processes > available
    for name, short, text, there in gather_across_ranks((node, too_much, str(needed), available)):
        if short:
            raise UserError(
                f"node {name}: loading needs {text}, but only {there / 1e9:.2f} GB of memory are "
                "available; lower training.micro_batch_size, evaluation.batch_size or the number "
                "of processes per node"
            )
    if world.is_main:
        log.info("loading needs %s; %.2f GB are available", needed, available / 1e9)
        if needed.per_process * processes + needed.page_cache > available:
            log.warning(
                "the data does not fit into the page cache: every epoch will read it anew; "
                "data.shuffle_pages makes that faster, by reading whole pages"
            )


def available_bytes(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process can still get.

    That is the machine's free memory, or what is left of the limit of a control group, such as a
    Slurm job's. ``root`` is the root of the file system, which tests replace.
    """
    kilobytes = re.search(
        r"^MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE
    )
    assert kilobytes
    return min(int(kilobytes[1]) * 1024, *_left_in_groups(root), sys.maxsize)


@dataclass(frozen=True)
class _GroupFiles:
    """The files in which a version of control groups keeps its numbers."""

    base: str
    """Folder of the groups, below the root."""
    limit: str
    used: str
    cached: str
    """Key in memory.stat of the file pages that can be given up."""


_VERSION_1 = _GroupFiles(
    base="sys/fs/cgroup/memory",
    limit="memory.limit_in_bytes",
    used="memory.usage_in_bytes",
    cached="total_inactive_file",
)
_VERSION_2 = _GroupFiles(
    base="sys/fs/cgroup", limit="memory.max", used="memory.current", cached="inactive_file"
)


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes that are left in each control group that holds this process."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            files = _VERSION_2
        elif "memory" in controllers.split(","):
            files = _VERSION_1
        else:
            continue
        base = root / files.base
        group = base / place.lstrip("/")
        while group.is_relative_to(base):
            # A limit of "max" is no number, and a namespace may hide the folder.
            with suppress(OSError, ValueError):
                yield _left(group, files)
            group = group.parent


def _left(group: Path, files: _GroupFiles) -> int:
    limit = int((group / files.limit).read_text())
    used = int((group / files.used).read_text())
    statistics = (group / "memory.stat").read_text()
    cached = re.search(rf"^{files.cached} (\d+)$", statistics, re.MULTILINE)
    return max(0, limit - used + (int(cached[1]) if cached else 0))
