"""Loading: exact pixels, every image exactly once, and an order and augmentation that nothing but
(seed, epoch) changes.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.types import HeaderType
from runs_for_tests import eval_loader, train_loader
from small_data import damage, recipe, stored

from pipeline.data.epoch_loader import Batch, threads
from pipeline.data.prepare import open_manifest
from pipeline.data.sources import open_source
from pipeline.data.stored_images import StoredImages
from pipeline.distributed import World
from pipeline.errors import UserError

AUGMENTED = {"flip": True, "crop_padding": 2}


def read(loader, epoch=0, start=0) -> list[Batch]:
    with loader.epoch(epoch, start) as batches:
        return list(batches)


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a is b is None or torch.equal(a, b)


def joined(batches: list[Batch]) -> Batch:
    return Batch(
        *(None if parts[0] is None else torch.cat(parts) for parts in zip(*batches, strict=True))
    )


@pytest.fixture(scope="module")
def augmented(digits):
    """The augmented training loader of one process; its first epoch."""
    loader = train_loader(recipe(digits, **AUGMENTED), World(), 64)
    return loader, read(loader, 0)


def test_digits_come_back_pixel_by_pixel(digits, make_recipe):
    recipe = make_recipe(prepared=digits)
    for split, source in open_source(recipe.data).items():
        loader = eval_loader(recipe, World(), 50, split)
        batches = read(loader)
        assert (
            len(batches) == loader.batches_per_epoch
            and loader.samples == len(source)
            and loader.classes == source.classes
        )
        assert batches[0].images.shape == (50, 3, 16, 16) and batches[0].images.is_contiguous(
            memory_format=torch.channels_last
        )
        assert [tensor.dtype for tensor in batches[0][:3]] == [
            torch.uint8,
            torch.int64,
            torch.int64,
        ] and batches[0].targets is None
        # kept until the end, so they are not views of buffers in use
        for batch in batches:
            for image, label, index in zip(*batch[:3], strict=True):
                pixels, wanted = stored(source, int(index), recipe.data), source.labels[index]
                assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels) and label == wanted


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_sees_every_image_exactly_once(digits, photos, make_recipe, size):
    for made, split, count in (
        (make_recipe(prepared=digits), "train", 1437),
        (make_recipe(**photos), "val", 10),
    ):
        seen: list[int] = []
        for rank in range(size):
            batches = read(eval_loader(made, World(rank, rank, size), 64, split))
            indices = torch.cat([batch.indices for batch in batches]).tolist()
            assert indices == list(range(rank, count, size))
            seen += indices
        assert sorted(seen) == list(range(count))


def test_restart_and_second_worker_change_nothing(digits, make_recipe, augmented):
    recipe = make_recipe(prepared=digits, workers=min(2, threads(2)), **AUGMENTED)
    assert_equal(read(train_loader(recipe, World(), 64)), augmented[1])


def test_world_sizes_see_the_same_global_batches(digits, make_recipe, augmented):
    recipe = make_recipe(prepared=digits, **AUGMENTED)
    # two micro batches of 2 x 16 per update
    loaders = [train_loader(recipe, World(rank, rank, 2), 16) for rank in range(2)]
    assert [loader.batches_per_epoch for loader in loaders] == [44, 44] and augmented[
        0
    ].batches_per_epoch == 22
    parts = [read(loader, 0) for loader in loaders]
    for update, batch in enumerate(augmented[1]):
        order = [parts[rank][2 * update + micro] for micro in range(2) for rank in range(2)]
        assert_equal([joined(order)], [batch])


def test_start_continues_the_epoch_and_decodes_nothing_before(augmented, monkeypatch):
    loader, batches = augmented
    decoded: list[int] = []
    decode = StoredImages.decode

    def counted(stored, samples, *others):
        decoded.extend(samples.tolist())
        decode(stored, samples, *others)

    monkeypatch.setattr(StoredImages, "decode", counted)
    assert_equal(read(loader, 0, start=7), batches[7:])
    assert decoded == torch.cat([batch.indices for batch in batches[7:]]).tolist()
    assert read(loader, 0, start=loader.batches_per_epoch) == []
    assert_equal(read(loader, 0), batches)


def test_epochs_and_seeds_differ(digits, make_recipe, augmented):
    loader, first = augmented
    second = read(loader, 1)
    order, other = (torch.cat([batch.indices for batch in batches]) for batches in (first, second))
    assert len(set(order.tolist())) == len(order) == 22 * 64 and not torch.equal(order, other)
    pictures, others = (
        {
            int(i): image
            for batch in epoch
            for image, i in zip(batch.images, batch.indices, strict=True)
        }
        for epoch in (first, second)
    )
    both = pictures.keys() & others.keys()
    assert sum(torch.equal(pictures[index], others[index]) for index in both) < len(both) / 10
    seeded = train_loader(make_recipe(prepared=digits, seed=1), World(), 64)
    with seeded.epoch(0) as batches:
        assert not torch.equal(next(batches).indices, first[0].indices)


def test_random_crops_depend_on_nothing_but_seed_and_epoch(photos, make_recipe):
    recipes = [
        make_recipe(**photos, workers=workers, global_batch_size=8)
        for workers in (1, min(2, threads(2)))
    ]
    loaders = [train_loader(recipe, World(), 8) for recipe in recipes]
    for epoch in (0, 1):
        assert_equal(read(loaders[0], epoch), read(loaders[1], epoch))
    first, second = (
        torch.cat([batch.images for batch in read(loaders[0], epoch)]) for epoch in (0, 1)
    )
    assert first.shape == (24, 3, 48, 48) and not torch.equal(first, second)


def test_evaluation_shows_the_centre_of_photos(photos, make_recipe):
    recipe = make_recipe(**photos)
    source = open_source(recipe.data)["val"]
    for batch in read(eval_loader(recipe, World(), 5)):
        for image, index in zip(batch.images, batch.indices, strict=True):
            pixels = stored(source, int(index), recipe.data)
            side = round(min(pixels.shape[:2]) * 224 / 256)
            top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
            centre = (
                torch.from_numpy(pixels[top : top + side, left : left + side].copy())
                .permute(2, 0, 1)[None]
                .float()
            )
            expected = torch.nn.functional.interpolate(
                centre, (48, 48), mode="area" if side >= 48 else "bilinear"
            )[0]
            # JPEG, and another interpolation
            assert (image - expected).abs().mean() < 4


def test_damaged_jpeg_is_reported(photos, make_recipe, tmp_path):
    shutil.copytree(photos["prepared"], tmp_path / "prepared")
    recipe = make_recipe(**{**photos, "prepared": str(tmp_path / "prepared")})
    damage(recipe.data.folder / "val.beton", 7)
    loader = eval_loader(recipe, World(), 4)
    with pytest.raises(UserError, match="image 7 cannot be decoded"):
        read(loader)
    # and the loader is of use again, for the images that are whole
    with loader.epoch(0) as batches:
        assert next(batches).indices.tolist() == [0, 1, 2, 3]


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
        # other loaders' threads may end meanwhile
        return len(os.listdir("/proc/self/task")), loader._thread._work_queue.qsize()

    before = work()
    for epoch in range(20):
        with loader.epoch(epoch) as batches:
            next(batches)
        assert work() <= before
    with pytest.raises(ZeroDivisionError), loader.epoch(0) as batches:
        next(batches)
        raise ZeroDivisionError
    # nobody takes the last two batches
    with loader.epoch(0, start=20):
        time.sleep(0.2)
    assert work() <= before


def test_only_one_epoch_is_open_at_a_time(augmented):
    loader, batches = augmented
    with loader.epoch(0):
        with pytest.raises(RuntimeError, match="open already"), loader.epoch(1):
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


def test_batches_that_do_not_fit_are_refused(digits, make_recipe):
    with pytest.raises(UserError, match="only 1437 training images"):
        train_loader(make_recipe(prepared=digits, global_batch_size=2000), World(), 2000)
    with pytest.raises(UserError, match="not a multiple"):
        train_loader(make_recipe(prepared=digits), World(0, 0, 3), 16)


def test_manifest_identifies_the_files(digits, photos):
    assert (
        open_manifest(digits / "digits-16").sha256
        != open_manifest(Path(photos["prepared"]) / "imagefolder-48").sha256
    )


@pytest.mark.parametrize("damage", ["unfinished", "truncated"])
def test_unfinished_and_truncated_files_are_refused(digits, make_recipe, tmp_path, damage):
    shutil.copytree(digits, tmp_path / "prepared")
    recipe = make_recipe(prepared=tmp_path / "prepared")
    with (recipe.data.folder / "train.beton").open("r+b") as file:
        if damage == "truncated":
            file.truncate(file.seek(0, os.SEEK_END) - 1000)
        else:
            file.seek(HeaderType.fields["alloc_table_ptr"][1])
            file.write(bytes(8))
    with pytest.raises(UserError, match=damage):
        train_loader(recipe, World(), 64)


def test_another_process_loads_the_same_with_any_number_of_threads_from_code_that_is_compiled(
    digits, augmented
):
    """With four threads, then on one processor where four are asked for; compiled code is in
    numba's cache; torch keeps its threads.
    """
    code = f"""
import torch
torch.set_num_threads(3)
import hashlib, os, sys, warnings
from pipeline.data.ffcv_library import load_ffcv
load_ffcv()
assert torch.get_num_threads() == 3
from pathlib import Path
from small_data import recipe
from pipeline.data import epoch_loader
from pipeline.data.decode import decode
from pipeline.distributed import World

def show():
    loader = train_loader(recipe(Path({str(digits)!r}), workers=4, **{AUGMENTED!r}), World(), 64)
    with loader.epoch(0) as batches:
        print(hashlib.sha256(b"".join(batch.images.numpy().tobytes() for batch in batches)).hexdigest())

limited, epoch_loader.threads = epoch_loader.threads, lambda workers: workers
show()
epoch_loader.threads = limited
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
show()
print(sum(decode.stats.cache_hits.values()), sum(decode.stats.cache_misses.values()))
"""
    path = ":".join(map(str, (Path(__file__).parent, Path(__file__).parents[2])))
    environment = {**os.environ, "PYTHONPATH": path, "NUMBA_NUM_THREADS": "4"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    expected = hashlib.sha256(
        b"".join(batch.images.numpy().tobytes() for batch in augmented[1])
    ).hexdigest()
    assert run.stdout.split() == [expected, expected, "1", "0"]
    assert "only 1 processors" in run.stderr


def test_importing_ffcv_compiles_nothing():
    # numba's own would be compiled in every process
    assert type(IMAGE_MODES) is dict
