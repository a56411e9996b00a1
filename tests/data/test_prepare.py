"""Preparing data: all is written exactly, or nothing is left and one line gives the reason."""

import os
import socket
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_source import faulty_source, one_line, remains
from runs_for_tests import train_loader
from small_data import write_images

from pipeline.data import encode
from pipeline.data.beton import measure
from pipeline.data.prepare import open_manifest, prepare
from pipeline.data.sources import SOURCES, open_source
from pipeline.distributed import World, process_group
from pipeline.errors import UserError


def test_a_mistake_of_our_own_is_not_a_broken_image(make_recipe, monkeypatch, capfd):
    def fit(*_):
        raise TypeError("a mistake of our own")

    monkeypatch.setattr(encode, "fit", fit)
    recipe = make_recipe(broken_images="skip")
    with pytest.raises(RuntimeError, match="a writer process failed"):
        prepare(recipe)
    assert "TypeError: a mistake of our own" in capfd.readouterr().err


def test_prepared_folder_holds_what_its_manifest_says(digits, make_recipe):
    recipe = make_recipe(prepared=digits)
    assert remains(recipe.data.folder) == ["manifest.json", "train.beton", "val.beton"]
    manifest, splits = open_manifest(recipe.data.folder), open_source(recipe.data)
    assert manifest.classes == tuple("0123456789")
    assert manifest.fixed_size
    assert len(manifest.sha256) == 64
    for name, split in splits.items():
        entry = manifest.splits[name]
        assert entry.samples == len(split)
        assert entry.class_counts == tuple(np.bincount(split.labels))
        assert entry.bytes == (recipe.data.folder / entry.file).stat().st_size


def test_second_prepare_returns_at_once_and_keeps_the_files(digits, make_recipe):
    recipe = make_recipe(prepared=digits)
    before = [path.stat().st_mtime_ns for path in sorted(recipe.data.folder.iterdir())]
    begin = time.monotonic()
    assert prepare(recipe) == recipe.data.folder
    assert time.monotonic() - begin < 1
    assert before == [path.stat().st_mtime_ns for path in sorted(recipe.data.folder.iterdir())]


def test_other_data_settings_are_refused(digits, make_recipe):
    recipe = make_recipe(prepared=digits, write_mode="jpg")
    for action in (prepare, lambda recipe: train_loader(recipe, World(), 64)):
        with pytest.raises(UserError) as error:
            action(recipe)
        assert "data.write_mode raw (recipe: jpg)" in one_line(error)
        assert "remove the folder or point data.prepared" in one_line(error)


def test_broken_images_are_named_and_nothing_is_left(make_recipe, tmp_path):
    write_images(tmp_path / "source", train=4, val=1)
    broken = tmp_path / "source/train/cat/2.png"
    broken.write_bytes(broken.read_bytes()[:200])
    (tmp_path / "source/train/dog/3.png").write_text("not an image")
    recipe = make_recipe(source="imagefolder", path=str(tmp_path / "source"))
    with pytest.raises(UserError) as error:
        prepare(recipe)
    assert str(broken) in one_line(error)
    assert "(and 1 more, listed above)" in one_line(error)
    assert remains(recipe.data.folder) == []


@pytest.mark.timeout(20)
def test_a_killed_worker_ends_the_writing(make_recipe, monkeypatch):
    monkeypatch.setitem(SOURCES, "faulty", faulty_source(deadly=5))
    recipe = make_recipe(source="faulty", workers=2)
    with pytest.raises(UserError) as error:
        prepare(recipe)
    assert "was ended by signal 9" in one_line(error)
    assert remains(recipe.data.folder) == []


@pytest.mark.timeout(20)
def test_a_killed_writer_leaves_nothing_that_loads_and_no_process(make_recipe, monkeypatch):
    monkeypatch.setitem(SOURCES, "faulty", faulty_source(seconds=1.0))
    recipe = make_recipe(source="faulty")
    writer = get_context("fork").Process(target=prepare, args=(recipe,))
    writer.start()
    temporary = recipe.data.folder / "train.beton.tmp"
    while (
        not (workers := [child for child in children(writer.pid) if running(child)])
        or not temporary.is_file()
    ):
        time.sleep(0.05)
    time.sleep(0.5)
    writer.kill()
    writer.join()
    with pytest.raises(UserError, match="unfinished"):
        measure(temporary)
    with pytest.raises(UserError, match="coda prepare"):
        train_loader(recipe, World(), 64)
    # The writer processes end with their parent, not when their images are done.
    while any(running(worker) for worker in workers):
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


def running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    tracker = b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return stat.rpartition(")")[2].split()[0] != "Z" and not tracker


@pytest.fixture
def copied(digits, make_recipe, tmp_path):
    """Recipe with a copy of the prepared digits that the test may damage."""
    recipe = make_recipe()
    recipe.data.folder.mkdir(parents=True)
    for path in (digits / recipe.data.folder.name).glob("[!.]*"):
        (recipe.data.folder / path.name).write_bytes(path.read_bytes())
    return recipe


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def unfinish(path: Path) -> None:
    # The address of the last table is 0 until the file is whole.
    with open(path, "r+b") as file:
        file.seek(16)
        file.write(bytes(8))


def exchange_label(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, unfinish, exchange_label, empty, os.remove])
def test_damaged_files_are_refused_before_ffcv_opens_them(copied, damage):
    damage(copied.data.folder / "train.beton")
    with pytest.raises(UserError) as error:
        train_loader(copied, World(), 64)
    assert "train.beton" in one_line(error)
    assert "coda prepare" in one_line(error)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "splits": {}}'])
def test_damaged_manifest_is_refused(copied, text):
    (copied.data.folder / "manifest.json").write_text(text)
    with pytest.raises(UserError) as error:
        open_manifest(copied.data.folder)
    assert "manifest.json" in one_line(error)
    assert "coda prepare" in one_line(error)


def test_missing_folder_names_the_remedy(make_recipe):
    with pytest.raises(UserError) as error:
        train_loader(make_recipe(), World(), 64)
    assert "coda prepare" in one_line(error)


def test_prepare_repairs_a_damaged_folder(copied):
    cut(copied.data.folder / "val.beton")
    prepare(copied)
    assert remains(copied.data.folder) == ["manifest.json", "train.beton", "val.beton"]
    assert open_manifest(copied.data.folder).splits["val"].samples == 360


def prepare_as_rank(rank: int, port: int, recipes, results) -> None:
    # OpenMP's threads do not survive a fork.
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with process_group(60):
        for recipe in recipes:
            try:
                results.put((rank, prepare(recipe).name))
            except UserError as error:
                results.put((rank, str(error)))


def test_two_ranks_prepare_once_and_fail_together(make_recipe):
    recipes = [make_recipe(source="imagefolder", path="nowhere"), make_recipe(image_size=8)]
    fork = get_context("fork")
    results = fork.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        fork.Process(target=prepare_as_rank, args=(rank, port, recipes, results))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    answers = sorted(results.get(timeout=60) for _ in range(4))
    for process in ranks:
        process.join()
    for rank in range(2):
        failed, succeeded = answers[2 * rank : 2 * rank + 2]
        assert succeeded == (rank, "digits-8")
        assert failed[0] == rank
        assert failed[1].startswith("data.path nowhere: there is no such file")
    assert remains(recipes[1].data.folder) == ["manifest.json", "train.beton", "val.beton"]
