"""Augmentations of decoded images: their effects, and their independence of the batch."""

from functools import partial

import numpy as np
import pytest
import torch
from batches import joined, read
from runs_for_tests import eval_loader, train_loader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from pipeline.data import augment, sampling
from pipeline.data.augment import color_jitter, mix, rand_augment, random_erasing
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.recipe.schedules import training_size

EVERYTHING = {
    "flip": True,
    "rand_augment_operations": 2,
    "color_jitter": 0.4,
    "random_erasing": 0.5,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
}


def pictures(count: int, size: int = 24) -> torch.Tensor:
    """Make smooth images (count, 3, size, size) in the loader's form: uint8, channels last."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    fine = (
        torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
        .mul(255)
        .to(torch.uint8)
    )
    return fine.to(memory_format=torch.channels_last)


def draws(count: int, seed: int = 0):
    return partial(sampling.uniform, seed, 0, np.arange(count))


@pytest.mark.parametrize(
    "function",
    [partial(rand_augment, operations=2, magnitude=9), partial(color_jitter, strength=0.4)],
)
def test_an_image_is_changed_alike_alone_and_among_others(function):
    # Sums over so many pixels are rounded, so their order could show.
    images = pictures(64, 260)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        together = function(images.clone(), draw=draws(64))
        assert (together != images).flatten(1).any(1).float().mean() > 0.8
        torch.set_num_threads(1)
        for number in range(0, 64, 7):
            draw = partial(sampling.uniform, 0, 0, np.array([number]))
            assert torch.equal(
                function(images[number : number + 1].clone(), draw=draw)[0], together[number]
            )
    finally:
        torch.set_num_threads(threads)


def test_rand_augment_does_each_of_torchvisions_operations_equally_often():
    images, library = pictures(1, 24).expand(2800, -1, -1, -1).clone(), v2.RandAugment()
    found = rand_augment(images.clone(), 1, 9, draws(2800))
    # Result of one operation on the picture -> expected share of such images.
    outcomes: dict[bytes, float] = {}
    for name, (magnitudes, signed) in library._AUGMENTATION_SPACE.items():
        scale = magnitudes(31, 24, 24)
        for sign in (1, -1) if signed else (1,):
            value = sign * float(scale[9]) if scale is not None else 0.0
            done = library._apply_image_or_video_transform(
                images[:1], name, value, library.interpolation, library._fill
            )
            key = done.contiguous().numpy().tobytes()
            outcomes[key] = outcomes.get(key, 0) + 1 / 14 / (2 if signed else 1)
    counts = dict.fromkeys(outcomes, 0)
    for image in found:
        # A KeyError means that the image is not the result of any operation.
        counts[image.contiguous().numpy().tobytes()] += 1
    for key, share in outcomes.items():
        assert counts[key] == pytest.approx(2800 * share, abs=4 * np.sqrt(2800 * share))


def test_color_jitter_is_torchvisions_steps_in_the_drawn_order():
    images, draw = pictures(32), draws(32)
    found = color_jitter(images.clone(), 0.4, draw)
    steps = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
    )
    for number, image in enumerate(images):
        factors = [1 + 0.4 * (2 * draw(augment.JITTER + step)[number] - 1) for step in range(3)]
        for step in np.argsort([draw(augment.JITTER + 3 + step)[number] for step in range(3)]):
            image = steps[step](image, factors[step])
        differences = (found[number].int() - image.int()).abs()
        # A fused multiplication may be rounded differently.
        assert differences.max() <= 3
        assert (differences == 0).float().mean() > 0.95


def test_random_erasing_erases_the_claimed_areas_in_the_claimed_share():
    found = random_erasing(torch.full((4000, 1, 50, 50), 7, dtype=torch.uint8), 0.25, draws(4000))
    areas = (found == 0).float().mean((1, 2, 3))
    erased = areas > 0
    assert erased.float().mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 4000))
    assert 0.015 < areas[erased].min() < 0.03
    assert 0.3 < areas.max() < 0.35
    for picture in found[erased][:20, 0] == 0:
        rows, columns = picture.any(1), picture.any(0)
        # The erased pixels fill their bounding box.
        assert picture.sum() == rows.sum() * columns.sum()


def test_mixup_mixes_neighbours_and_their_targets_in_the_same_shares():
    images = torch.zeros(2000, 3, 4, 4, dtype=torch.uint8)
    images[1::2] = 200
    labels = torch.arange(2000) % 2
    mixed, targets = mix(images.clone(), labels, 5, 0.8, 0.0, draws(2000))
    assert (targets.sum(1) - 1).abs().max() < 1e-6
    assert not targets[:, 2:].any()
    # Both partners keep the same share of their own image.
    assert torch.equal(targets[::2, 0], targets[1::2, 1])
    assert (mixed.float() - 200 * targets[:, 1].view(-1, 1, 1, 1)).abs().max() <= 0.501
    share = targets[::2, 0].double()
    # Mean and variance are those of Beta(0.8, 0.8).
    assert share.mean() == pytest.approx(0.5, abs=0.04)
    assert share.var() == pytest.approx(1 / 4 / 2.6, rel=0.1)


def test_cutmix_pastes_a_rectangle_of_the_neighbour_whose_area_is_its_target():
    images = torch.zeros(400, 3, 16, 16, dtype=torch.uint8)
    images[1::2] = 1
    mixed, targets = mix(images.clone(), torch.arange(400) % 2, 2, 0.0, 1.0, draws(400))
    assert torch.equal(mixed[:, 0].float().mean((1, 2)), targets[:, 1])
    for picture in mixed[::2, 0]:
        assert picture.sum() == picture.any(1).sum() * picture.any(0).sum()
    share = targets[::2, 0].double()
    assert share.max() > 0.95
    assert share.min() < 0.2


def test_with_both_each_is_done_half_of_the_time():
    images = torch.zeros(2000, 1, 16, 16, dtype=torch.uint8)
    images[1::2] = 200
    mixed, targets = mix(images, torch.arange(2000) % 2, 2, 1.0, 1.0, draws(2000))
    really = (targets[::2, 0] > 0.05) & (targets[::2, 0] < 0.95)
    blended = ((mixed > 0) & (mixed < 200)).flatten(1).any(1)[::2]
    assert blended[really].float().mean() == pytest.approx(0.5, abs=0.06)


def test_all_together_depend_on_neither_world_size_nor_threads_nor_restarts(digits, make_recipe):
    recipe = make_recipe(prepared=digits, **EVERYTHING)
    whole = read(train_loader(recipe, World(), 64), 3)
    assert len(whole) == 22
    assert whole[0].targets.shape == (64, 10)
    for size, micro in ((2, 32), (4, 8)):
        loaders = [train_loader(recipe, World(rank, rank, size), micro) for rank in range(size)]
        # Loading continues from the fifth update on.
        parts = [read(loader, 3, start=5 * 64 // micro // size) for loader in loaders]
        for update, batch in enumerate(whole[5:]):
            micros = 64 // micro // size
            order = [
                parts[rank][micros * update + turn]
                for turn in range(micros)
                for rank in range(size)
            ]
            assert all(torch.equal(a, b) for a, b in zip(joined(order), batch, strict=True))
    assert not torch.equal(read(train_loader(recipe, World(), 64), 4)[0].images, whole[0].images)


def test_odd_micro_batches_cannot_be_mixed(digits, make_recipe):
    with pytest.raises(
        UserError, match="must be even, but 64 images on 64 processes are micro batches of 1"
    ):
        train_loader(make_recipe(prepared=digits, cutmix_alpha=1.0), World(0, 0, 64), 1)


def test_resolution_rises_without_compiling_again(photos, make_recipe):
    from pipeline.data.decode import decode

    recipe = make_recipe(
        **photos,
        global_batch_size=8,
        epochs=5,
        progressive={"start_size": 16, "until": 0.8, "step": 8},
        eval_size=64,
    )
    loader = train_loader(recipe, World(), 8)
    first = read(loader, 0)
    compiled = len(decode.signatures)
    sizes = [read(loader, epoch)[0].images.shape[-1] for epoch in range(5)]
    assert (
        sizes
        == [16, 24, 32, 40, 48]
        == [training_size(recipe.data, epoch, 5) for epoch in range(5)]
    )
    assert torch.equal(read(loader, 0)[0].images, first[0].images)
    assert read(eval_loader(recipe, World(), 4))[0].images.shape == (4, 3, 64, 64)
    assert len(decode.signatures) == compiled
