"""Checkpoints: resumed equals uninterrupted at every ZeRO stage, damage is skipped, and nothing foreign is loaded."""

import json
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from recipes_for_tests import small_recipe

from pipeline.distributed import process_group
from pipeline.errors import UserError
from pipeline.training.checkpoint import newest_model


def updates(run, count):
    """``count`` updates from where the run stands, without evaluation."""
    epoch, done = divmod(run.updates, run.updates_per_epoch)
    run.engine.train()
    with run.batches.epoch(epoch, done * run.accumulation) as batches:
        for _ in range(count):
            run._update(batches)
            run.updates += 1


def weights(run):
    return [tensor.clone() for tensor in run.engine.module.state_dict().values()]


def build(folder, world, **changes):
    from pipeline.training.loop import Run

    return Run(small_recipe(folder, **changes), world)


def _resumed_equals_uninterrupted(rank, size, port, folder, runs, stage):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    changes = dict(runs=str(runs), training__zero_stage=stage, model__name="coda_resnet20", model__args={"rank": 2})
    with process_group(timeout_seconds=120) as world:
        whole = build(folder, world, **changes)
        updates(whole, 2)
        whole.checkpoints.save(whole.engine, whole.updates)
        updates(whole, 3)
        torch.manual_seed(rank + 99)
        parted = build(folder, world, **changes)
        parted.resume()
        assert parted.updates == 2
        updates(parted, 3)
        mine, theirs = weights(whole), weights(parted)
        if rank:  # DeepSpeed keeps parameters equal; batch norm statistics of other ranks are averaged before they matter
            mine, theirs = list(whole.engine.module.parameters()), list(parted.engine.module.parameters())
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_resumed_equals_uninterrupted_bitwise_on_two_processes(prepared, tmp_path, stage):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_resumed_equals_uninterrupted, args=(2, port, prepared, tmp_path, stage), nprocs=2, start_method="spawn")


@pytest.fixture
def saved(prepared, tmp_path):
    """A run with two checkpoints, still in its process group."""
    with process_group() as world:
        run = build(prepared, world, runs=str(tmp_path))
        for _ in range(2):
            updates(run, 1)
            run.checkpoints.save(run.engine, run.updates)
        yield run


def test_a_damaged_checkpoint_is_skipped_with_a_message(saved, capsys):
    newest = saved.checkpoints.folder / "update-2" / "model.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + b"!")
    saved.resume()
    assert saved.updates == 1
    assert "update-2 is damaged and skipped" in capsys.readouterr().err


def test_an_unfinished_checkpoint_is_removed(saved):
    leftover = saved.checkpoints.folder / ".saving-3"
    leftover.mkdir()
    saved.resume()
    assert saved.updates == 2 and not leftover.exists()


def test_only_the_newest_are_kept(saved):
    updates(saved, 1)
    saved.checkpoints.save(saved.engine, saved.updates)
    assert sorted(path.name for path in saved.checkpoints.folder.iterdir()) == ["update-2", "update-3"]


def test_a_checkpoint_of_another_model_is_refused_in_one_line(saved, prepared):
    other = build(prepared, saved.world, runs=str(saved.recipe.runs), model__args={"rank": 4})
    with pytest.raises(UserError, match="do not fit this model") as error:
        other.resume()
    assert "\n" not in str(error.value)


def test_sharded_checkpoints_say_what_they_need(saved, prepared):
    sharded = build(prepared, saved.world, runs=str(saved.recipe.runs), training__zero_stage=1)
    with pytest.raises(UserError, match="no shards, this run needs 1"):
        sharded.resume()


def test_loading_runs_no_code(saved, tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path = saved.checkpoints.folder / "update-2"
    torch.save({"model": Harmful()}, path / "model.pt")
    from pipeline.training.checkpoint import _sha256

    files = {name: [(path / name).stat().st_size, _sha256(path / name)] for name in ("model.pt", "rank-0.pt")}
    (path / "manifest.json").write_text(json.dumps(files))
    with pytest.raises(UserError, match="not loaded"):
        saved.resume()
    assert not (tmp_path / "harm").exists()


def test_no_checkpoint_is_said_clearly(tmp_path):
    with pytest.raises(UserError, match="no valid checkpoint"):
        newest_model(tmp_path)
