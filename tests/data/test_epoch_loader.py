"""Loading: exact pixels, every image exactly once, and a reproducible order and augmentation."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import assert_equal, joined, read
from ffcv.types import HeaderType
from runs_for_tests import eval_loader, train_loader
from small_data import AUGMENTED, damage, stored

from pipeline.data.epoch_loader import threads
from pipeline.data.prepare import open_manifest
from pipeline.data.sources import open_source
from pipeline.data.stored_images import StoredImages
from pipeline.distributed import World
from pipeline.errors import UserError


def test_digits_come_back_pixel_by_pixel(digits, make_recipe):
    recipe = make_recipe(prepared=digits)
    for split, source in open_source(recipe.data).items():
        loader = eval_loader(recipe, World(), 50, split)
        batches = read(loader)
        assert len(batches) == loader.batches_per_epoch
        assert loader.samples == len(source)
        assert loader.classes == source.classes
        assert batches[0].images.shape == (50, 3, 16, 16)
        assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
        assert [tensor.dtype for tensor in batches[0][:3]] == [
            torch.uint8,
            torch.int64,
            torch.int64,
        ]
        assert batches[0].targets is None
        # All batches are kept until here, so they cannot be views of buffers in use.
        for batch in batches:
            for image, label, index in zip(*batch[:3], strict=True):
                pixels, wanted = stored(source, int(index), recipe.data), source.labels[index]
                assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
                assert label == wanted


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
    # An update has two micro batches of 2 x 16 images.
    loaders = [train_loader(recipe, World(rank, rank, 2), 16) for rank in range(2)]
    assert [loader.batches_per_epoch for loader in loaders] == [44, 44]
    assert augmented[0].batches_per_epoch == 22
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
    assert len(set(order.tolist())) == len(order) == 22 * 64
    assert not torch.equal(order, other)
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
    assert first.shape == (24, 3, 48, 48)
    assert not torch.equal(first, second)


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
            # JPEG and another interpolation change some pixels.
            assert (image - expected).abs().mean() < 4


def test_damaged_jpeg_is_reported(photos, make_recipe, tmp_path):
    shutil.copytree(photos["prepared"], tmp_path / "prepared")
    recipe = make_recipe(**{**photos, "prepared": str(tmp_path / "prepared")})
    damage(recipe.data.folder / "val.beton", 7)
    loader = eval_loader(recipe, World(), 4)
    with pytest.raises(UserError, match="image 7 cannot be decoded"):
        read(loader)
    # The loader can be used again for the images that are whole.
    with loader.epoch(0) as batches:
        assert next(batches).indices.tolist() == [0, 1, 2, 3]


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
