"""Resumed equals uninterrupted: at every ZeRO stage, and on any number of processes."""

import pytest
import torch
from processes import forget_process_groups, free_port, run_on, stand_as
from recipes_for_tests import small_recipe
from runs_for_tests import start_run

from pipeline.distributed import gather_across_ranks, process_group


def statistics(run):
    """Batch norm statistics of this process: (``model`` or ``average``, name) -> values."""
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
        model__name="coda_resnet20",
        model__args={"rank": 2},
        training__zero_stage=stage,
        training__optimizer=optimizer,
        training__weight_average=0.9,
        training__label_smoothing=0.1,
    )
    with process_group(timeout_seconds=120) as world:
        whole = start_run(folder, world, **changes)
        whole.update(2)
        before = statistics(whole)
        whole.save()
        own, other = gather_across_ranks(before)
        stored = torch.load(whole.checkpoints.folder / "update-2" / "model.pt", weights_only=True)
        for (key, name), kept in statistics(whole).items():
            one, two = own[key, name], other[key, name]
            assert not torch.equal(one, two)
            torch.testing.assert_close(stored[key][name], (one + two) / 2)
            # The run itself goes on with its own statistics.
            assert torch.equal(kept, before[key, name])
        whole.update(3)
        torch.manual_seed(rank + 99)
        parted = start_run(folder, world, **changes)
        assert parted.updates == 2
        parted.update(3)
        assert all(
            torch.equal(a, b) for a, b in zip(whole.weights(), parted.weights(), strict=True)
        )


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
    # This is after the first epoch; the last evaluation is of the export.
    assert len(one) == 1
    assert all(
        torch.equal(a, b)
        for epochs in zip(one, other, strict=True)
        for a, b in zip(*epochs, strict=True)
    )


def test_every_evaluation_sees_the_same_statistics_on_two_processes(prepared, tmp_path):
    run_on(2, _evaluated, prepared, tmp_path)


# The small recipe's model has no batch norm.
WITHOUT_BATCH_NORM = {"training__optimizer": "sgd", "training__learning_rate": 0.5}


WORLDS = (1, 2, 4, 2, 1)


def _through_worlds(rank, _, __, ports, folder, runs):
    """Two updates in each of the worlds that this process belongs to."""
    for turn, (size, port) in enumerate(zip(WORLDS, ports, strict=True)):
        if rank < size:
            stand_as(rank, size, port)
            with process_group(timeout_seconds=120) as world:
                run = start_run(folder, world, runs=str(runs), **WITHOUT_BATCH_NORM)
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
        whole = start_run(prepared, world, runs=str(tmp_path / "whole"), **WITHOUT_BATCH_NORM)
        before = whole.weights()
        whole.update(2 * len(WORLDS))
        parted = start_run(prepared, world, runs=str(tmp_path / "parted"), **WITHOUT_BATCH_NORM)
        assert parted.updates == whole.updates
    difference = max(
        (a - b).abs().max().item() for a, b in zip(whole.weights(), parted.weights(), strict=True)
    )
    moved = max((a - b).abs().max().item() for a, b in zip(whole.weights(), before, strict=True))
    assert moved > 1e-3
    assert difference < 1e-6
