"""The loader's thread and numba's threads: errors, ends, limits, and code that is compiled once."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from batches import assert_equal, read
from ffcv.fields.rgb_image import IMAGE_MODES
from runs_for_tests import eval_loader, train_loader
from small_data import AUGMENTED

from pipeline.data.epoch_loader import threads
from pipeline.distributed import World

SCRIPT = Path(__file__).with_name("loader_process.py")


@pytest.mark.timeout(10)
def test_error_in_the_thread_reaches_the_consumer(digits, make_recipe):
    loader = train_loader(make_recipe(prepared=digits), World(), 64)
    loader._stored = None
    with (
        pytest.raises(RuntimeError, match="reading stopped: AttributeError") as error,
        loader.epoch(0) as batches,
    ):
        next(batches)
    assert isinstance(error.value.__cause__, AttributeError)


def test_abandoned_epochs_leave_nothing_behind(augmented):
    loader, _ = augmented

    def work() -> tuple[int, int]:
        # Threads of other loaders may end meanwhile, so less is fine, too.
        return len(os.listdir("/proc/self/task")), loader._thread._work_queue.qsize()

    before = work()
    for epoch in range(20):
        with loader.epoch(epoch) as batches:
            next(batches)
        assert work() <= before

    def fail() -> None:
        with loader.epoch(0) as batches:
            next(batches)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    # The last two batches are decoded, but never taken.
    with loader.epoch(0, start=20):
        time.sleep(0.2)
    assert work() <= before


def test_only_one_epoch_is_open_at_a_time(augmented):
    loader, batches = augmented
    with loader.epoch(0), pytest.raises(RuntimeError, match="open already"), loader.epoch(1):
        pass
    assert_equal(read(loader, 0), batches)


def test_torch_keeps_its_threads(digits, make_recipe, augmented):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        eval_loader(make_recipe(prepared=digits), World(), 64)
        assert torch.get_num_threads() == 3
        with augmented[0].epoch(0) as batches:
            next(batches)
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_workers_are_limited_to_the_processors(monkeypatch, caplog):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert threads(8) == 1
    assert "only 1 processor" in caplog.text


def test_another_process_loads_the_same_with_any_number_of_threads(digits, augmented):
    """Its compiled code comes from numba's cache, and torch keeps its threads."""
    paths = os.pathsep.join(map(str, (SCRIPT.parent, SCRIPT.parents[2])))
    environment = {**os.environ, "PYTHONPATH": paths, "NUMBA_NUM_THREADS": "4"}
    command = [sys.executable, SCRIPT, digits, json.dumps(AUGMENTED)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    images = b"".join(batch.images.numpy().tobytes() for batch in augmented[1])
    expected = hashlib.sha256(images).hexdigest()
    assert done.stdout.split() == [expected, expected, "1", "0"]
    assert "only 1 processors" in done.stderr


def test_importing_ffcv_compiles_nothing():
    # A dictionary of numba's would be compiled in every process.
    assert type(IMAGE_MODES) is dict
