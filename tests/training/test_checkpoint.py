"""Checkpoints: damage is skipped, the right ones are kept, and nothing foreign is loaded."""

import errno
import json
import os
import re
import resource

import pytest
import timm
import torch
from runs_for_tests import StartedRun, start_run
from safetensors.torch import save_file

from pipeline.distributed import process_group
from pipeline.errors import UserError
from pipeline.files import sha256_of
from pipeline.training.checkpoint_files import newest_model
from pipeline.training.lease import Lease


def again(run):
    """Start the same run once more."""
    return StartedRun(run.recipe, run.world)


@pytest.fixture
def saved(prepared, tmp_path):
    """A run with two checkpoints, still in its process group."""
    with process_group() as world:
        run = start_run(prepared, world, runs=str(tmp_path))
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
        run = start_run(prepared, world, **changes)
        run.update(1)
        run.save()
        source.unlink()
        resumed = again(run)
        assert resumed.updates == 1
        assert all(torch.equal(a, b) for a, b in zip(run.weights(), resumed.weights(), strict=True))
        # Without a valid checkpoint it begins anew.
        (run.checkpoints.folder / "update-1" / "model.pt").unlink()
        with pytest.raises(UserError, match="cannot be read"):
            again(run)


def test_an_unfinished_checkpoint_is_removed(saved):
    leftover = saved.checkpoints.folder / ".saving-3"
    leftover.mkdir()
    assert again(saved).updates == 2
    assert not leftover.exists()


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
    """A limit on the size of files replaces a full disk.

    The kernel refuses the same write with another error number.
    """
    saved.update(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match="cannot be written: File too large; update-2 stays the newest"
        ) as failure:
            saved.save()
        assert failure.value.errno == errno.EFBIG
        assert failure.value.filename.endswith("checkpoints/update-3")
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
    with pytest.raises(UserError, match=r"slurm-7\.1 has taken over"):
        saved.save()
    assert sorted(path.name for path in saved.checkpoints.folder.iterdir()) == [
        "update-1",
        "update-2",
    ]


def test_an_older_restart_of_a_job_does_not_take_over(tmp_path):
    newer, older = Lease(tmp_path / "lease", "slurm-7.10"), Lease(tmp_path / "lease", "slurm-7.9")
    older.take()
    newer.take()
    message = r"slurm-7\.10 is training it, so the older slurm-7\.9 stops"
    with pytest.raises(UserError, match=message):
        older.take()
    newer.check()
    # Another job is not an older restart.
    Lease(tmp_path / "lease", "slurm-8.0").take()


def test_a_save_says_how_long_and_how_much(saved, caplog):
    caplog.set_level("INFO")
    saved.update(1)
    saved.save()
    assert re.search(r"saved .*update-3: \d+\.\d MB in \d+\.\d\d s", caplog.text)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(saved, prepared):
    with pytest.raises(UserError, match="do not fit this model") as error:
        start_run(prepared, saved.world, runs=str(saved.recipe.runs), model__args={"rank": 4})
    assert "\n" not in str(error.value)


def test_sharded_checkpoints_say_what_they_need(saved, prepared):
    with pytest.raises(UserError, match="no shards, this run needs 1"):
        start_run(prepared, saved.world, runs=str(saved.recipe.runs), training__zero_stage=1)


def test_loading_runs_no_code(saved, tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path = saved.checkpoints.folder / "update-2"
    torch.save({"model": Harmful()}, path / "model.pt")
    files = {
        name: [(path / name).stat().st_size, sha256_of(path / name)]
        for name in ("model.pt", "rank-0.pt")
    }
    (path / "manifest.json").write_text(json.dumps(files))
    with pytest.raises(UserError, match="not loaded"):
        again(saved)
    assert not (tmp_path / "harm").exists()


def test_no_checkpoint_is_said_clearly(tmp_path):
    with pytest.raises(UserError, match="no valid checkpoint"):
        newest_model(tmp_path)
