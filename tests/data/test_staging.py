"""Copies on the node's disk, shuffling by pages, and the estimate of memory."""

import multiprocessing
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from batches import read
from runs_for_tests import eval_loader, train_loader

from pipeline.data import loaders, memory, sampling, staging
from pipeline.data.manifest import open_manifest
from pipeline.data.prepared import open_prepared
from pipeline.data.stored_images import StoredImages
from pipeline.distributed import World
from pipeline.errors import UserError


@pytest.fixture
def staged(digits, make_recipe, tmp_path, monkeypatch):
    """Make a recipe that reads from a copy; an environment variable names its folder."""
    monkeypatch.setenv("JOB_DISK", str(tmp_path / "disk"))
    return make_recipe(prepared=digits, storage="stage_local", scratch="$JOB_DISK/data")


def stage(recipe):
    return staging.readable_file(recipe.data, open_manifest(recipe.data.folder), "train")


def test_loaders_read_from_the_copy(digits, make_recipe, staged, tmp_path):
    loader = train_loader(staged, World(), 64)
    assert loader.path.is_relative_to(tmp_path / "disk" / "data")
    assert loader.path.read_bytes() == (digits / "digits-16" / "train.beton").read_bytes()
    for copied, original in zip(
        read(loader), read(train_loader(make_recipe(prepared=digits), World(), 64)), strict=True
    ):
        assert torch.equal(copied.images, original.images)
    assert eval_loader(staged, World(), 64).path.parent == loader.path.parent


def test_a_whole_copy_is_used_again_and_a_broken_one_replaced(staged):
    copy = stage(staged)
    inode, content = copy.stat().st_ino, copy.read_bytes()
    assert stage(staged).stat().st_ino == inode
    copy.write_bytes(content[:-100])
    copy.with_name("train.beton.tmp").write_bytes(b"of a copy that was killed")
    assert stage(staged).read_bytes() == content
    assert sorted(os.listdir(copy.parent)) == [".lock", "train.beton"]


def test_damage_that_the_tables_do_not_show_is_not_copied(digits, make_recipe, tmp_path):
    shutil.copytree(digits, tmp_path / "prepared")
    recipe = make_recipe(
        prepared=tmp_path / "prepared", storage="stage_local", scratch=str(tmp_path / "disk")
    )
    with (recipe.data.folder / "train.beton").open("r+b") as file:
        file.seek(int(StoredImages(recipe.data.folder / "train.beton")._starts[5]))
        file.write(b"\x01\x02\x03")
    with pytest.raises(UserError, match="byte by byte"):
        stage(recipe)
    assert not list((tmp_path / "disk").rglob("train.beton*"))


def test_processes_of_a_node_copy_once(staged, monkeypatch, tmp_path):
    def counted(source, target, wanted):
        with (tmp_path / "copies").open("a") as file:
            file.write("x")
        shutil.copyfile(source, target)

    monkeypatch.setattr(staging, "_copy", counted)
    processes = [
        multiprocessing.get_context("fork").Process(target=stage, args=(staged,)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert (tmp_path / "copies").read_text() == "x"


def test_a_disk_without_room_or_name_is_refused(digits, make_recipe, staged, monkeypatch, tmp_path):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1e6))
    with pytest.raises(
        UserError, match=r"has 0\.0 GB free and train.beton needs .* data.storage=page_cache"
    ):
        stage(staged)
    monkeypatch.delenv("JOB_DISK")
    with pytest.raises(UserError, match="environment variable is not set on this node"):
        stage(staged)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be staged"):
        stage(make_recipe(prepared=digits, storage="stage_local", scratch=str(tmp_path / "file")))


def test_impossible_combinations_are_refused_with_the_reason(digits, make_recipe):
    with pytest.raises(
        UserError,
        match=r"data\.scratch is '/tmp'; it must be null, as data\.storage is not stage_local",
    ):
        make_recipe(scratch="/tmp")
    paged = make_recipe(prepared=digits, shuffle_pages=1, global_batch_size=1438)
    with pytest.raises(
        UserError, match=r"hold some 1437 images, fewer than training\.global_batch_size 1438"
    ):
        loaders._shuffle(paged, paged.data.folder / "train.beton", 1437)


def test_page_order_visits_all_and_holds_a_window_at_a_time():
    # 100 pages of 100 samples each.
    pages = np.random.default_rng(0).permutation(np.arange(10_000) // 100)
    orders = [sampling.page_permutation(0, epoch, pages, 8) for epoch in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(10_000))
        windows = pages[order][:9600].reshape(12, 800)
        assert all(len(np.unique(window)) == 8 for window in windows)
        # The samples of a window are mixed.
        assert all(len(np.unique(window[:100])) == 8 for window in windows)


def test_paged_loader_does_not_depend_on_the_world_size(digits, make_recipe):
    recipe = make_recipe(prepared=digits, shuffle_pages=1, flip=True)
    whole = read(train_loader(recipe, World(), 64), 1)
    parts = [read(train_loader(recipe, World(rank, rank, 2), 32), 1) for rank in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([half.images for half in halves]), batch.images)


def test_estimate_is_of_what_is_allocated(photos, make_recipe):
    recipe = make_recipe(**photos, workers=2)
    needed = memory.estimate(recipe, open_prepared(recipe.data), micro_batch=100, processes=3)
    largest = max(
        int((loader._stored.heights * loader._stored.widths).max()) * 3
        for loader in [eval_loader(recipe, World(), 4)]
    )
    # 4 batches ahead and one with the consumer, for training and evaluation.
    batches = 5 * (100 + 128) * 48 * 48 * 3
    assert batches + 2 * largest < needed.per_process < batches + 4 * 300 * 300 * 3
    assert needed.processes == 3
    assert needed.page_cache == sum(
        (recipe.data.folder / name).stat().st_size for name in ("train.beton", "val.beton")
    )
    one_page = make_recipe(**photos, shuffle_pages=1)
    paged = memory.estimate(one_page, open_prepared(one_page.data), 100, 1)
    assert paged.page_cache <= needed.page_cache


def test_too_little_memory_is_refused_before_anything_is_allocated(
    digits, make_recipe, monkeypatch, caplog
):
    caplog.set_level("INFO")
    recipe = make_recipe(prepared=digits)
    memory.check_memory(recipe, open_prepared(recipe.data), World(), 64)
    assert "loading needs 0.00 GB (1 x 0.00)" in caplog.text
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 << 20)
    with pytest.raises(
        UserError,
        match=r"node .*: loading needs .* 0\.00 GB of memory are available; "
        r"lower training\.micro_batch_size",
    ):
        memory.check_memory(recipe, open_prepared(recipe.data), World(), 2048)
    memory.check_memory(recipe, open_prepared(recipe.data), World(), 64)
    assert "does not fit into the page cache" in caplog.text


def test_limits_of_control_groups_count(tmp_path):
    files = {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n",
        "proc/self/cgroup": "4:cpu,memory:/slurm/job\n0::/job/step\n",
        # The step itself has no limit.
        "sys/fs/cgroup/job/memory.max": "5000000\n",
        "sys/fs/cgroup/job/memory.current": "3000000\n",
        "sys/fs/cgroup/job/memory.stat": "anon 7\ninactive_file 1000000\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
        "sys/fs/cgroup/job/step/memory.current": "1\n",
        "sys/fs/cgroup/memory/slurm/job/memory.limit_in_bytes": "9000000\n",
        "sys/fs/cgroup/memory/slurm/job/memory.usage_in_bytes": "1\n",
        "sys/fs/cgroup/memory/slurm/job/memory.stat": "total_inactive_file 0\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.available_bytes(tmp_path) == 3_000_000
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    assert memory.available_bytes(tmp_path) == 8000 * 1024
    assert 0 < memory.available_bytes() < 1 << 50
