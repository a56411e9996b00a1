"""Interrupted writers: they continue, and the files are the same, byte for byte."""

import errno
import os
import resource
import signal
import time
from multiprocessing import get_context

import pytest
from faulty_source import faulty_source, one_line, remains
from ffcv.reader import Reader

from pipeline.data import chunk_writer
from pipeline.data.beton import MIN_PAGE
from pipeline.data.chunk_journal import ChunkJournal
from pipeline.data.images import BrokenImage
from pipeline.data.prepare import prepare
from pipeline.data.sources import SOURCES, Source
from pipeline.errors import UserError

COUNT = 60
"""Images of each split, which are written in chunks of 5."""


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture
def reference(make_recipe, monkeypatch, tmp_path):
    """Return the files that one process writes without interruption."""
    monkeypatch.setitem(SOURCES, "squares", faulty_source(COUNT))
    recipe = make_recipe(source="squares", chunk_size=5, workers=1, prepared=tmp_path / "reference")
    prepare(recipe)
    return contents(recipe.data.folder)


@pytest.fixture
def recipe(make_recipe):
    return make_recipe(source="squares", chunk_size=5, workers=2)


def finished(recipe, name="train") -> int:
    """Return the number of chunks in the journal in the recipe's folder."""
    path = recipe.data.folder / f"{name}.beton.tmp.journal"
    return max(len(path.read_bytes().splitlines()) - 1, 0) if path.is_file() else 0


def prepare_in_foreground(recipe):
    """Prepare as from a terminal: a process in the background may ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare(recipe)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_writer_continues(reference, recipe, monkeypatch, number, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(chunk_writer, "SYNC_SECONDS", 0)
    monkeypatch.setitem(SOURCES, "squares", faulty_source(COUNT, seconds=0.05))
    writer = get_context("fork").Process(target=prepare_in_foreground, args=(recipe,))
    writer.start()
    while finished(recipe) < 4:
        time.sleep(0.01)
    os.kill(writer.pid, number)
    writer.join()
    done = finished(recipe)
    assert 4 <= done < COUNT / 5
    assert not (recipe.data.folder / "train.beton").exists()
    read = get_context("fork").Value("i", 0)
    monkeypatch.setitem(SOURCES, "squares", counting(read))
    prepare(recipe)
    # No image is read twice.
    assert read.value == 2 * COUNT - 5 * done
    assert f"continues after {5 * done} images" in caplog.text
    assert contents(recipe.data.folder) == reference


def counting(read):
    """Return the source, which counts in ``read`` the images that all processes read."""
    splits = faulty_source(COUNT).open(None)
    kind = type(splits["train"])

    class Counting(kind):
        def read(self, index):
            with read.get_lock():
                read.value += 1
            return super().read(index)

    counted = {
        name: Counting(split.classes, split.labels, split.fixed_size)
        for name, split in splits.items()
    }
    return Source(lambda data: counted)


def test_a_broken_image_is_repaired_and_writing_continues(reference, recipe, monkeypatch):
    def broken(data):
        splits = faulty_source(COUNT).open(data)

        class Broken(type(splits["train"])):
            def read(self, index):
                if index == 32:
                    raise BrokenImage("is broken")
                return super().read(index)

        return {**splits, "train": Broken(splits["train"].classes, splits["train"].labels, True)}

    monkeypatch.setitem(SOURCES, "squares", Source(broken))
    with pytest.raises(UserError) as error:
        prepare(recipe)
    assert "square 32: is not a readable image: is broken" in one_line(error)
    assert "data.broken_images=skip" in one_line(error)
    assert 4 <= finished(recipe) <= 6
    monkeypatch.setitem(SOURCES, "squares", faulty_source(COUNT))
    prepare(recipe)
    assert contents(recipe.data.folder) == reference


def test_another_source_is_not_continued(reference, recipe, monkeypatch, caplog):
    monkeypatch.setitem(SOURCES, "squares", faulty_source(COUNT, deadly=50))
    monkeypatch.setattr(chunk_writer, "SYNC_SECONDS", 0)
    with pytest.raises(UserError, match="it continues"):
        prepare(recipe)
    assert finished(recipe)
    monkeypatch.setitem(SOURCES, "squares", faulty_source(COUNT + 1))
    prepare(recipe)
    assert "begun again" in caplog.text
    assert remains(recipe.data.folder) == ["manifest.json", "train.beton", "val.beton"]


def test_a_damaged_journal_counts_up_to_its_damage(recipe, reference, monkeypatch):
    monkeypatch.setattr(chunk_writer, "SYNC_SECONDS", 0)
    monkeypatch.setitem(SOURCES, "squares", faulty_source(COUNT, deadly=59))
    with pytest.raises(UserError):
        prepare(recipe)
    data = recipe.data.folder / "train.beton.tmp"
    journal = data.with_name("train.beton.tmp.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    identity = lines[0].decode().split('"')[3]
    assert len(lines) >= 6
    whole = journal.read_bytes()
    for damaged, chunks in (
        # A line is cut off.
        (whole[:-7], len(lines) - 2),
        (b"".join([*lines[:3], b"\0" * 100 + b"\n", *lines[4:]]), 2),
        (b"".join(lines[:2]) + lines[2].replace(b'"end": ', b'"end": 9'), 1),
        (lines[0], 0),
        (b"", 0),
        (b'{"identity": "another"}\n' + b"".join(lines[1:]), 0),
    ):
        journal.write_bytes(damaged)
        assert len(ChunkJournal(data, identity).chunks) == chunks
    journal.write_bytes(whole)
    found = ChunkJournal(data, identity).chunks
    size = data.stat().st_size
    os.truncate(data, found[2].end - 1)
    # The file does not hold the third chunk any more.
    assert len(ChunkJournal(data, identity).chunks) == 2
    os.truncate(data, size)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:50])
    monkeypatch.setitem(SOURCES, "squares", faulty_source(COUNT))
    prepare(recipe)
    assert contents(recipe.data.folder) == reference


def test_bytes_that_the_disk_has_changed_are_found(recipe, reference, monkeypatch):
    monkeypatch.setattr(chunk_writer, "SYNC_SECONDS", 0)
    monkeypatch.setitem(SOURCES, "squares", faulty_source(COUNT, deadly=59))
    with pytest.raises(UserError):
        prepare(recipe)
    data = recipe.data.folder / "train.beton.tmp"
    with open(data, "r+b") as file:
        # Damage the first image.
        file.seek(MIN_PAGE)
        file.write(b"\xff")
    monkeypatch.setitem(SOURCES, "squares", faulty_source(COUNT))
    with pytest.raises(UserError, match="not those that were written"):
        prepare(recipe)


def test_chunks_and_processes_do_not_change_a_byte(make_recipe, monkeypatch, tmp_path):
    monkeypatch.setitem(SOURCES, "squares", faulty_source(COUNT))
    found = []
    for chunk_size, workers in ((7, 1), (7, 2), (100, 2)):
        folder = tmp_path / f"{chunk_size}-{workers}"
        recipe = make_recipe(
            source="squares",
            chunk_size=chunk_size,
            workers=workers,
            write_mode="proportion",
            prepared=folder,
        )
        prepare(recipe)
        found.append(contents(recipe.data.folder))
    assert found[0] == found[1] == found[2]
    modes = Reader(str(recipe.data.folder / "train.beton")).metadata["f0"]["mode"]
    # About half of the images are raw.
    assert 0.3 < modes.mean() < 0.7


@pytest.mark.timeout(60)
def test_a_full_disk_is_one_line_and_writing_continues(make_recipe, monkeypatch, tmp_path):
    """A limit of the file's size replaces the disk: the same call fails with another number."""
    monkeypatch.setitem(SOURCES, "squares", faulty_source(COUNT))
    monkeypatch.setattr(chunk_writer, "SYNC_SECONDS", 0)
    settings = {"source": "squares", "chunk_size": 5, "workers": 2, "image_size": 224}
    reference, recipe = (
        make_recipe(**settings, prepared=tmp_path / "reference"),
        make_recipe(**settings),
    )
    prepare(reference)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIN_PAGE + 30 * 224 * 224 * 3, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*the same command continues") as error:
            prepare(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    assert error.value.filename == str(recipe.data.folder)
    assert 0 < finished(recipe) <= 6
    prepare(recipe)
    assert contents(recipe.data.folder) == contents(reference.data.folder)


def peak(recipes, results) -> None:
    """Put the peak memory of this process and its writers in KiB, after each of the ``recipes``."""
    for recipe in recipes:
        prepare(recipe)
        results.put(
            [
                resource.getrusage(who).ru_maxrss
                for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
            ]
        )


@pytest.mark.timeout(120)
def test_memory_does_not_grow_with_the_data(make_recipe, monkeypatch, tmp_path):
    """Ten times the images take 180 MB more on the disk, but not 20 MB more in memory."""
    for name, count in (("few", 200), ("many", 2000)):
        monkeypatch.setitem(SOURCES, name, faulty_source(count))
    recipes = [
        make_recipe(source=name, image_size=130, chunk_size=20, prepared=tmp_path / name)
        for name in ("few", "many")
    ]
    fork = get_context("fork")
    results = fork.Queue()
    process = fork.Process(target=peak, args=(recipes, results))
    process.start()
    few, many = results.get(timeout=60), results.get(timeout=60)
    process.join()
    size = {
        recipe.data.source: sum(path.stat().st_size for path in recipe.data.folder.iterdir())
        for recipe in recipes
    }
    assert size["many"] - size["few"] > 150e6
    assert max(after - before for before, after in zip(few, many, strict=True)) < 20_000
