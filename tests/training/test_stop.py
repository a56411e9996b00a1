"""Requests to stop, at any moment and by either signal, and errors while stopping."""

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from processes import run_on, stand_as
from recipes_for_tests import small_recipe
from runs_for_tests import history, start_command

from pipeline.distributed import World, barrier, gather_across_ranks, process_group
from pipeline.errors import UserError
from pipeline.run_folder import RunFolder
from pipeline.training import checkpoint, loop
from pipeline.training.checkpoint_files import newest_model
from pipeline.training.failures import Watchdog, first_error
from pipeline.training.run import train
from pipeline.training.stop import REQUEUE, Stop


def wait_for(reached, seconds=240):
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ask(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def ask_and_fail(error):
    ask()
    raise error


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with Stop(World()) as stop:
        assert not stop.agreed()
        ask(number)
        # Slurm repeats its signals.
        ask(number)
        assert stop.agreed()
    assert signal.getsignal(number) == before


def test_a_signal_from_before_the_handlers_is_not_lost():
    # The signal is blocked at first, as slurm/common.sh starts the processes.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    # Other threads of this process do not block it.
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    with Stop(World()) as stop:
        assert stop.asked


def test_where_nothing_is_to_be_saved_it_ends_at_once():
    with Stop(World()) as stop, pytest.raises(SystemExit) as left, stop.at_once():
        ask_and_fail(AssertionError("went on"))
    assert left.value.code == REQUEUE
    with Stop(World()) as stop:
        ask()
        # It was asked before the block.
        with pytest.raises(SystemExit), stop.at_once():
            raise AssertionError("went on")


@pytest.mark.parametrize(
    ("owner", "name", "saved"), [(checkpoint, "store_state", 3), (loop, "evaluate", 11)]
)
def test_a_signal_during_a_save_or_an_evaluation(
    prepared, tmp_path, monkeypatch, owner, name, saved
):
    """A save is finished first; an evaluation is left, and the next start begins with it.

    Nothing is missing, and nothing is logged twice.
    """
    recipe = small_recipe(prepared, runs=str(tmp_path), training__checkpoint_every_updates=3)
    original = getattr(owner, name)

    def interrupted(*arguments):
        ask()
        return original(*arguments)

    with process_group() as world:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, interrupted)
            with pytest.raises(SystemExit) as left:
                train(recipe, world)
        assert left.value.code == REQUEUE
        found = [path.name for path in (recipe.folder.path / "checkpoints").iterdir()]
        assert f"update-{saved}" in found
        assert not [name for name in found if name.startswith(".")]
        assert newest_model(recipe.folder.path / "checkpoints")
        assert not any(key == "val/top1" for key, _, _ in history(recipe))
        train(recipe, world)
    assert [step for key, step, _ in history(recipe) if key == "val/top1"] == [1, 2]
    assert [step for key, step, _ in history(recipe) if key == "train/loss"] == [
        128 * update for update in range(1, 23)
    ]


def test_one_process_of_two_is_asked_and_both_stop_at_one_update(prepared, tmp_path):
    changes = dict(
        model__name="coda_resnet20",
        model__args={"rank": 2},
        runs=str(tmp_path),
        training__epochs=300,
    )
    recipe = small_recipe(prepared, name="asked", **changes)
    launcher = start_command(recipe, tmp_path, processes=2)
    journal = recipe.folder.journal
    wait_for(lambda: journal.exists() and "train/loss" in journal.read_text())
    second = [
        pid
        for pid in children(launcher.pid)
        if b"LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    ]
    os.kill(second[0], signal.SIGUSR1)
    launcher.wait(120)
    log = (tmp_path / "asked.log").read_text()
    assert f"exitcode  : {REQUEUE}" in log
    images = max(step for name, step, _ in history(recipe) if name == "train/loss")
    last = images // recipe.training.global_batch_size
    assert (recipe.folder.path / "checkpoints" / f"update-{last}").is_dir()
    assert f"asked to stop: saved at update {last} of 3300" in log
    assert not (recipe.folder.path / "first_error.txt").exists()


def children(process):
    return [
        int(pid)
        for pid in subprocess.run(
            ["pgrep", "-P", str(process)], capture_output=True, text=True
        ).stdout.split()
    ]


def test_the_first_error_of_any_process_stands_in_one_file(tmp_path):
    first = World(rank=1, size=2, incarnation="slurm-3.0")
    second = World(rank=0, size=2, incarnation="slurm-3.0")
    for world, message in ((first, "the cause"), (second, "connection lost")):
        with pytest.raises(RuntimeError), first_error(RunFolder(tmp_path), world, Stop(world)):
            raise RuntimeError(message)
    text = (tmp_path / "first_error.txt").read_text()
    assert text.startswith("process 1 of 2, slurm-3.0, ")
    assert "RuntimeError: the cause" in text
    assert "connection lost" not in text
    again = World(rank=0, size=2, incarnation="slurm-3.1")
    with pytest.raises(RuntimeError), first_error(RunFolder(tmp_path), again, Stop(again)):
        raise RuntimeError("another")
    # The file is of the newest start.
    assert "RuntimeError: another" in (tmp_path / "first_error.txt").read_text()
    with first_error(RunFolder(tmp_path), again, Stop(again)):
        pass
    assert not list(tmp_path.iterdir())


def test_a_mistake_found_before_there_is_a_run_leaves_none(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError), first_error(RunFolder(folder), World(), Stop(World())):
        raise UserError("no such model")
    assert not folder.exists()
    # An error that the user cannot foresee is kept.
    with pytest.raises(RuntimeError), first_error(RunFolder(folder), World(), Stop(World())):
        raise RuntimeError("out of memory")
    assert "out of memory" in (folder / "first_error.txt").read_text()


def _leave_or_lose(rank, size, port, folder, results):
    """Both are asked to stop; the second process is gone before the first can tell it anything."""
    stand_as(rank, size, port)
    with process_group(timeout_seconds=60) as world, Stop(world) as stop:
        ask()
        barrier()
        if rank:
            os._exit(0)
        try:
            with first_error(RunFolder(folder), world, stop):
                gather_across_ranks(rank)
        except SystemExit as left:
            results.put(left.code)


def test_a_connection_lost_while_stopping_is_no_error(tmp_path):
    results = get_context("forkserver").SimpleQueue()
    run_on(2, _leave_or_lose, tmp_path, results)
    assert results.get() == REQUEUE
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [KeyError("step"), RuntimeError("shapes differ"), torch.OutOfMemoryError("no memory")],
    ids=repr,
)
def test_any_other_error_while_stopping_is_kept(tmp_path, error):
    with (
        Stop(World()) as stop,
        pytest.raises(type(error)),
        first_error(RunFolder(tmp_path), World(), stop),
    ):
        ask_and_fail(error)
    assert type(error).__name__ in (tmp_path / "first_error.txt").read_text()


HANGS = """
import sys, time
from pathlib import Path
from pipeline.distributed import World
from pipeline.run_folder import RunFolder
from pipeline.training.failures import Watchdog
def stuck_here():
    print("stuck", flush=True)
    time.sleep(3)
with Watchdog(RunFolder(Path(sys.argv[1])), World(timeout_seconds=2)):
    stuck_here()
"""


def test_a_process_that_hangs_says_where_by_itself_and_when_asked(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HANGS, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGUSR2)
    assert process.wait(60) == 0
    asked, sign, by_itself = (
        (tmp_path / "stacks" / "alone-rank-0.txt").read_text().partition("Timeout (0:00:01.8")
    )
    assert sign
    assert "stuck_here" in asked
    assert "stuck_here" in by_itself


def test_a_process_that_moves_leaves_no_stacks(tmp_path):
    with Watchdog(RunFolder(tmp_path), World(timeout_seconds=1)) as watchdog:
        for _ in range(6):
            watchdog.beat()
            time.sleep(0.2)
    assert not list((tmp_path / "stacks").iterdir())
