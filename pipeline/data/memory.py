"""Whether the batches that loaders make fit into the memory of the node, before one is made.

Files are mapped, so pages that were read stay in the page cache, once for all processes of a node,
as long as there is room.
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

# per stored image and loader: FFCV's tables of it (45), our copies (48), and an epoch's order
TABLE_BYTES = 128


@dataclass(frozen=True)
class Memory:
    """What loading will take on one node, in bytes."""

    per_process: int
    """Batches in flight, images being decoded, tables."""
    processes: int
    page_cache: int
    """Of all processes together; the kernel gives it up where memory is short."""

    def __str__(self) -> str:
        total = self.per_process * self.processes
        return f"{total / 1e9:.2f} GB ({self.processes} x {self.per_process / 1e9:.2f}), and {self.page_cache / 1e9:.2f} GB of page cache"


def estimate(recipe: Recipe, prepared: PreparedData, micro_batch: int, processes: int) -> Memory:
    """Estimate what the loaders of ``processes`` processes on a node will take."""
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
    """Say what loading will take on each node. Every process must call it, before it makes loaders.

    Raises:
        UserError: on every process, if there is a node that does not have as much.
    """
    node = os.uname().nodename
    processes = gather_across_ranks(node).count(node)
    needed = estimate(recipe, prepared, micro_batch, processes)
    available = available_bytes()
    too_much = needed.per_process * processes > available
    for name, short, text, there in gather_across_ranks((node, too_much, str(needed), available)):
        if short:
            raise UserError(
                f"node {name}: loading needs {text}, but only {there / 1e9:.2f} GB of memory are available; "
                "lower training.micro_batch_size, evaluation.batch_size or the number of processes per node"
            )
    if world.is_main:
        log.info("loading needs %s; %.2f GB are available", needed, available / 1e9)
        if needed.per_process * processes + needed.page_cache > available:
            log.warning(
                "the data does not fit into the page cache: every epoch will read it anew; "
                "data.shuffle_pages makes that faster, by reading whole pages"
            )


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can still get: the machine's, or what is left of the limit of a
    control group, such as a Slurm job's.
    """
    kilobytes = re.search(
        r"^MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE
    )
    assert kilobytes
    return min(int(kilobytes[1]) * 1024, *_left_in_groups(root), sys.maxsize)


def _left_in_groups(root: Path) -> Iterator[int]:
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        # version 2
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = (
                root / "sys/fs/cgroup/memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        group = base / place.lstrip("/")
        while group.is_relative_to(base):
            # no limit is "max", and a namespace may hide the folder
            with suppress(OSError, ValueError):
                limit, used = (int((group / name).read_text()) for name in names[:2])
                cached = re.search(
                    rf"^{names[2]} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE
                )
                yield max(0, limit - used + (int(cached[1]) if cached else 0))
            group = group.parent
