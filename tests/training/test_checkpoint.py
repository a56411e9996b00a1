"""Checkpoints: resumed equals uninterrupted at every ZeRO stage, damage is skipped, and nothing
foreign is loaded.
"""

import errno
import json
import os
import re
import resource

import pytest
import timm
import torch
from processes import forget_process_groups, free_port, run_on, stand_as
from recipes_for_tests import small_recipe
from runs_for_tests import StartedRun
from safetensors.torch import save_file

from pipeline.distributed import gather_across_ranks, process_group
from pipeline.errors import UserError
from pipeline.training.checkpoint import newest_model
from pipeline.training.lease import Lease


def weights(run):
    modules = [run.engine.module, *([] if run.average is None else [run.average])]
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def build(folder, world, **changes):
    return StartedRun(small_recipe(folder, **changes), world)


def statistics(run):
    """Batch norm statistics of this process: (model or its average, name) -> values."""
    modules = {"model": run.engine.module, "average": run.average}
    return {
        (key, name): buffer.clone()
        for key, module in modules.items()
        for name, buffer in module.named_buffers()
        if "running" in name
    }


def _resumed_equals_uninterrupted(rank, size, port, folder, runs, optimizer, stage):
    stand_as(rank, size, port)
    changes = dict(
        runs=str(runs),
        training__zero_stage=stage,
        model__name="coda_resnet20",
        model__args={"rank": 2},
    )
    changes |= dict(
        training__optimizer=optimizer, training__weight_average=0.9, training__label_smoothing=0.1
    )
    with process_group(timeout_seconds=120) as world:
        whole = build(folder, world, **changes)
        whole.update(2)
        before = statistics(whole)
        whole.save()
        own, other = gather_across_ranks(before)
        stored = torch.load(whole.checkpoints.folder / "update-2" / "model.pt", weights_only=True)
        for (key, name), kept in statistics(whole).items():
            one, two = own[key, name], other[key, name]
            assert not torch.equal(one, two)
            torch.testing.assert_close(stored[key][name], (one + two) / 2)
            # for going on
            assert torch.equal(kept, before[key, name])
        whole.update(3)
        torch.manual_seed(rank + 99)
        parted = build(folder, world, **changes)
        assert parted.updates == 2
        parted.update(3)
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(parted), strict=True))


def again(run):
    """The same training, started once more."""
    return StartedRun(run.recipe, run.world)


@pytest.mark.parametrize(
    ("optimizer", "stage"), [("adamw", 0), ("adamw", 1), ("adamw", 2), ("muon", 0)]
)
def test_resumed_equals_uninterrupted_bitwise_on_two_processes(
    prepared, tmp_path, optimizer, stage
):
    run_on(2, _resumed_equals_uninterrupted, prepared, tmp_path, optimizer, stage)


def _evaluated(rank, size, port, folder, runs):
    from pipeline.training import loop
    from pipeline.training.run import train

    seen, evaluate = [], loop.evaluate

    def watched(model, *arguments):
        seen.append([buffer.clone() for buffer in model.buffers() if buffer.is_floating_point()])
        return evaluate(model, *arguments)

    loop.evaluate = watched
    stand_as(rank, size, port)
    recipe = small_recipe(
        folder,
        runs=str(runs),
        model__name="coda_resnet20",
        model__args={"rank": 2},
        training__epochs=2,
    )
    with process_group(timeout_seconds=120) as world:
        train(recipe, world)
        one, other = gather_across_ranks(seen)
    # after the first epoch; the last evaluation is of the export
    assert len(one) == 1
    assert all(
        torch.equal(a, b)
        for epochs in zip(one, other, strict=True)
        for a, b in zip(*epochs, strict=True)
    )


def test_every_evaluation_sees_the_same_statistics_on_two_processes(prepared, tmp_path):
    run_on(2, _evaluated, prepared, tmp_path)


# the small recipe's model has none
WITHOUT_BATCH_NORM = {"training__optimizer": "sgd", "training__learning_rate": 0.5}
WORLDS = (1, 2, 4, 2, 1)


def _through_worlds(rank, _, __, ports, folder, runs):
    """Two updates in each of the worlds that this process belongs to."""
    for turn, (size, port) in enumerate(zip(WORLDS, ports, strict=True)):
        if rank < size:
            stand_as(rank, size, port)
            with process_group(timeout_seconds=120) as world:
                run = build(folder, world, runs=str(runs), **WITHOUT_BATCH_NORM)
                assert run.updates == 2 * turn
                run.update(2)
                run.save()
            forget_process_groups()


def test_resumed_on_other_numbers_of_processes_within_rounding(prepared, tmp_path):
    """1 -> 2 -> 4 -> 2 -> 1 processes with the same global batch, against 1 throughout."""
    run_on(
        max(WORLDS), _through_worlds, [free_port() for _ in WORLDS], prepared, tmp_path / "parted"
    )
    with process_group() as world:
        whole = build(prepared, world, runs=str(tmp_path / "whole"), **WITHOUT_BATCH_NORM)
        before = weights(whole)
        whole.update(2 * len(WORLDS))
        parted = build(prepared, world, runs=str(tmp_path / "parted"), **WITHOUT_BATCH_NORM)
        assert parted.updates == whole.updates
    difference = max(
        (a - b).abs().max().item() for a, b in zip(weights(whole), weights(parted), strict=True)
    )
    moved = max((a - b).abs().max().item() for a, b in zip(weights(whole), before, strict=True))
    assert moved > 1e-3 and difference < 1e-6


@pytest.fixture
def saved(prepared, tmp_path):
    """A run with two checkpoints, still in its process group."""
    with process_group() as world:
        run = build(prepared, world, runs=str(tmp_path))
        for _ in range(2):
            run.update(1)
            run.save()
        yield run


def test_a_damaged_checkpoint_is_skipped_with_a_message(saved, caplog):
    newest = saved.checkpoints.folder / "update-2" / "model.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + b"!")
    assert again(saved).updates == 1
    assert "update-2 is damaged and skipped" in caplog.text


def test_weights_that_a_training_began_with_are_needed_only_once(prepared, tmp_path):
    source = tmp_path / "backbone.safetensors"
    save_file(timm.create_model("resnet18").state_dict(), source)
    changes = dict(
        runs=str(tmp_path),
        model__name="coda_resnet18",
        model__args={"pretrained_backbone": str(source)},
    )
    with process_group() as world:
        run = build(prepared, world, **changes)
        run.update(1)
        run.save()
        source.unlink()
        resumed = again(run)
        assert resumed.updates == 1
        assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(resumed), strict=True))
        # without a valid checkpoint it begins anew
        (run.checkpoints.folder / "update-1" / "model.pt").unlink()
        with pytest.raises(UserError, match="cannot be read"):
            again(run)


def test_an_unfinished_checkpoint_is_removed(saved):
    leftover = saved.checkpoints.folder / ".saving-3"
    leftover.mkdir()
    assert again(saved).updates == 2 and not leftover.exists()


def test_only_the_newest_are_kept(saved):
    saved.update(1)
    saved.save()
    assert sorted(path.name for path in saved.checkpoints.folder.iterdir()) == [
        "update-2",
        "update-3",
    ]


def test_the_best_is_kept_beside_the_newest(saved):
    saved.checkpoints.mark_best(2, 0.9)
    for _ in range(3):
        saved.update(1)
        saved.save()
        saved.checkpoints.mark_best(saved.updates, 0.8)
    assert {path.name for path in saved.checkpoints.folder.glob("update-*")} == {
        "update-2",
        "update-4",
        "update-5",
    }


def test_a_disk_without_room_leaves_the_checkpoints_before_it(saved):
    """A limit on the size of files stands for the disk: the kernel refuses the same write with
    another number.
    """
    saved.update(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match="cannot be written: File too large; update-2 stays the newest"
        ) as failure:
            saved.save()
        assert failure.value.errno == errno.EFBIG and failure.value.filename.endswith(
            "checkpoints/update-3"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in saved.checkpoints.folder.iterdir()) == [
        "update-1",
        "update-2",
    ]
    saved.save()
    assert newest_model(saved.checkpoints.folder)


def test_a_start_that_was_superseded_cannot_write(saved):
    saved.update(1)
    Lease(saved.recipe.folder.lease, "slurm-7.1").take()
    with pytest.raises(UserError, match="slurm-7.1 has taken over"):
        saved.save()
    assert sorted(path.name for path in saved.checkpoints.folder.iterdir()) == [
        "update-1",
        "update-2",
    ]


def test_an_older_restart_of_a_job_does_not_take_over(tmp_path):
    newer, older = Lease(tmp_path / "lease", "slurm-7.10"), Lease(tmp_path / "lease", "slurm-7.9")
    older.take()
    newer.take()
    with pytest.raises(UserError, match=r"slurm-7.10 is training it, so the older slurm-7.9 stops"):
        older.take()
    newer.check()
    # another job is no older one
    Lease(tmp_path / "lease", "slurm-8.0").take()


def test_a_save_says_how_long_and_how_much(saved, caplog):
    caplog.set_level("INFO")
    saved.update(1)
    saved.save()
    assert re.search(r"saved .*update-3: \d+\.\d MB in \d+\.\d\d s", caplog.text)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(saved, prepared):
    with pytest.raises(UserError, match="do not fit this model") as error:
        build(prepared, saved.world, runs=str(saved.recipe.runs), model__args={"rank": 4})
    assert "\n" not in str(error.value)


def test_sharded_checkpoints_say_what_they_need(saved, prepared):
    with pytest.raises(UserError, match="no shards, this run needs 1"):
        build(prepared, saved.world, runs=str(saved.recipe.runs), training__zero_stage=1)


def test_loading_runs_no_code(saved, tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path = saved.checkpoints.folder / "update-2"
    torch.save({"model": Harmful()}, path / "model.pt")
    from pipeline.training.checkpoint import _sha256

    files = {
        name: [(path / name).stat().st_size, _sha256(path / name)]
        for name in ("model.pt", "rank-0.pt")
    }
    (path / "manifest.json").write_text(json.dumps(files))
    with pytest.raises(UserError, match="not loaded"):
        again(saved)
    assert not (tmp_path / "harm").exists()


def test_no_checkpoint_is_said_clearly(tmp_path):
    with pytest.raises(UserError, match="no valid checkpoint"):
        newest_model(tmp_path)
