"""Write a source's images to ``train.beton`` and ``val.beton``, and the manifest that says they are whole.

Files are written under temporary names, checked by decoding every image once, and renamed; the manifest comes last. FFCV's own
writer waits for ever when an image is broken or a worker dies; this one ends with a single error.
"""

import ctypes
import fcntl
import importlib.metadata
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from ctypes.util import find_library
from multiprocessing.context import ForkProcess
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch.distributed as dist
from ffcv.fields import IntField, RGBImageField
from ffcv.memory_allocator import MemoryAllocator
from ffcv.writer import DatasetWriter, worker_job_indexed_dataset
from tqdm import tqdm

from pipeline.data.augment import whole_boxes
from pipeline.data.load import EpochLoader, threads
from pipeline.data.manifest import NAME, Manifest, SplitFile, measure, open_manifest, path_name, publish, write_manifest
from pipeline.data.sources import MAX_ASPECT, Split, open_source, stored_side
from pipeline.distributed import gather_across_ranks
from pipeline.errors import UserError
from pipeline.recipe import DataRecipe, Recipe

MIN_PAGE = 1 << 23  # bytes; FFCV stores an image within one page, whose size is a power of two
CHUNK = 32  # images that a writer process takes at a time
VERIFY_BATCH = 64
WAITING, DONE, BROKEN = range(3)
PR_SET_PDEATHSIG = 1
FORK = multiprocessing.get_context("fork")  # writer processes share the source and the tables with this one


def prepare(recipe: Recipe) -> Path:
    """Prepare the recipe's data, or return at once if that has been done; the main process works, the others wait for it.

    Returns:
        the folder: ``recipe.data.folder``.

    Raises:
        UserError: on every process. Unknown or broken source, a broken image, a full disk, or a folder of other data settings.
    """
    failure: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            _prepare(recipe.data)
        except Exception as error:  # told to the waiting processes first
            failure = error
    message = gather_across_ranks(failure and (str(failure) or repr(failure)))[0]
    if failure:
        raise failure
    if message:
        raise UserError(message)
    return recipe.data.folder


def _prepare(data: DataRecipe) -> None:
    if _is_prepared(data):
        return
    try:
        data.folder.mkdir(parents=True, exist_ok=True)
        with _locked(data.folder):
            if not _is_prepared(data):
                _write_all(data)
    except OSError as error:
        raise UserError(f"{data.folder}: cannot be written ({error.strerror or error})") from error


def _is_prepared(data: DataRecipe) -> bool:
    try:
        manifest = open_manifest(data.folder)
    except UserError:
        return False  # nothing there, or remains that are worth nothing
    manifest.require(data)
    return True


@contextmanager
def _locked(folder: Path):
    """Hold the folder against other jobs that want to prepare the same data."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(f"{folder}: waiting for another process that prepares it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_all(data: DataRecipe) -> None:
    splits = open_source(data)
    temporary = {name: data.folder / f"{name}.beton.tmp" for name in splits}
    try:
        for name, split in splits.items():
            _write_split(temporary[name], split, data, name)
        manifest = _describe(splits, temporary, data)
        for name, split in splits.items():
            _verify(temporary[name], split, manifest, name, data.workers)
        (data.folder / NAME).unlink(missing_ok=True)
        for path in temporary.values():
            publish(path, path.with_suffix(""))
        write_manifest(data.folder, manifest)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _describe(splits: Mapping[str, Split], files: Mapping[str, Path], data: DataRecipe) -> Manifest:
    entries = {}
    for name, split in splits.items():
        size, samples, tables = measure(files[name])
        counts = np.bincount(split.labels, minlength=len(split.classes))
        entries[name] = SplitFile(files[name].stem, size, samples, tuple(int(count) for count in counts), tables)
    train = splits["train"]
    version = importlib.metadata.version("ffcv")
    return Manifest(data.source, path_name(data), data.image_size, data.write_mode, train.fixed_size, train.classes, entries, version)


def _write_split(path: Path, split: Split, data: DataRecipe, name: str) -> None:
    short = data.image_size if split.fixed_size else stored_side(data.image_size)
    largest = 3 * short * short * (1 if split.fixed_size else MAX_ASPECT)
    page = max(MIN_PAGE, 1 << (2 * largest - 1).bit_length())  # twice the pixels: a JPEG of noise can be larger than they are
    images = _Watched(split)
    fields = {"image": RGBImageField(write_mode=data.write_mode), "label": IntField()}
    _Writer(path, fields, page, threads(data.workers), images.states, name).from_indexed_dataset(images, chunksize=CHUNK)
    broken = np.flatnonzero(images.states == BROKEN)
    if len(broken):
        first = int(broken[0])
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        try:
            split[first]
            reason = "could not be read the first time"
        except Exception as error:
            reason = str(error) or type(error).__name__
        raise UserError(f"{split.describe(first)}: is not a readable image: {reason}{more}; repair or remove it and prepare again")


def _verify(path: Path, split: Split, manifest: Manifest, name: str, workers: int) -> None:
    """Decode every image of a written file once, as training will, and compare the labels."""
    everything = np.arange(len(split))
    loader = EpochLoader(
        path, manifest, name, VERIFY_BATCH, workers, lambda epoch: everything, lambda heights, widths, *_: whole_boxes(heights, widths)
    )
    with loader.epoch(0) as batches, tqdm(total=len(split), desc=f"checking {name}", unit="image") as bar:
        for batch in batches:
            if not np.array_equal(batch.labels.numpy(), split.labels[batch.indices.numpy()]):
                raise UserError(f"{path}: labels differ from those of the source; the disk may be failing")
            bar.update(len(batch.labels))


class _Watched:
    """A split whose broken images are noted and replaced, because an error would end FFCV's writer process unseen.

    Attributes:
        states: (N,) uint8 in memory that all processes share: WAITING, DONE or BROKEN.
    """

    def __init__(self, split: Split):
        self.split = split
        self.states = np.frombuffer(FORK.RawArray(ctypes.c_uint8, len(split)), np.uint8)  # type: ignore[call-overload]

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            image, label = self.split[index]
            state = DONE
        except Exception:
            image, label = np.zeros((1, 1, 3), np.uint8), 0
            state = BROKEN
        self.states[index] = state
        return image, label


class _Writer(DatasetWriter):
    """FFCV's writer with its waiting loop replaced: it ends when a worker process dies, and leaves nothing behind."""

    def __init__(self, path: Path, fields: Mapping[str, Any], page_size: int, workers: int, states: np.ndarray, name: str):
        super().__init__(str(path), fields, page_size, workers)
        self.states, self.name = states, name

    def _write_common(self, num_samples, queue_content, work_fn, extra_worker_args) -> None:
        self.num_samples = num_samples
        needed, free = num_samples * self.metadata_type.itemsize, shutil.disk_usage("/dev/shm").free
        if needed > free:
            raise UserError(
                f"/dev/shm has {free} bytes free and writing {num_samples} images takes {needed}; enlarge it (docker: --shm-size)"
            )
        self.prepare()
        work: Any = FORK.Queue()
        allocations: Any = FORK.Queue()
        for item in (*queue_content, *[None] * self.num_workers):  # one None per process: no more work
            work.put(item)
        allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
        done = FORK.Value(ctypes.c_uint64, 0)
        arguments = (work, self.metadata_sm, self.metadata_type, self.fields, allocator, done, allocations, *extra_worker_args)
        processes = [FORK.Process(target=_work, args=(os.getpid(), *arguments)) for _ in range(self.num_workers)]
        try:
            for process in processes:
                process.start()
            self.finalize(self._collect(processes, allocations))
        finally:
            for process in processes:
                process.kill()
                process.join()
            work.cancel_join_thread()
            self.metadata_sm.close()
            self.metadata_sm.unlink()

    def _collect(self, processes: list[ForkProcess], allocations: Any) -> list[tuple[int, int, int]]:
        """Wait for the address table of every process: (sample, address, bytes) of what it stored."""
        table: list[tuple[int, int, int]] = []
        waiting = len(processes)
        with tqdm(total=self.num_samples, desc=f"writing {self.name}", unit="image") as bar:
            while waiting:
                try:
                    table += allocations.get(timeout=0.1)
                    waiting -= 1
                except Empty:
                    for process in processes:
                        if process.exitcode:
                            raise UserError(
                                f"{self.fname}: a writer process ended with code {process.exitcode} (-9: killed, often out of memory; "
                                "1: its error is above, such as a full disk); free the resource and prepare again"
                            ) from None
                bar.update(np.count_nonzero(self.states) - bar.n)
        return table


def _work(parent: int, *arguments: Any) -> None:
    """A writer process: FFCV's, but it does not outlive its parent and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(find_library("c")).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:  # else it died before the line above
        worker_job_indexed_dataset(*arguments)
