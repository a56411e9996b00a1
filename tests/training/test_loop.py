"""Whole runs: killed and continued, on one process and two, in parts and at once."""

import re
import signal
import time
from pathlib import Path

import mlflow
import pytest
from processes import run_on, stand_as
from recipes_for_tests import small_recipe
from runs_for_tests import history, losses, start_command

from pipeline.distributed import process_group
from pipeline.errors import UserError
from pipeline.training.run import train

# Times are not reproducible.
TIMED = ("speed/",)


def test_killed_and_started_again_ends_as_if_it_had_never_stopped(prepared, tmp_path):
    changes = dict(
        model__name="coda_resnet20",
        model__args={"rank": 2},
        training__epochs=3,
        training__checkpoint_every_updates=4,
        data__rand_augment_operations=1,
        data__color_jitter=0.3,
        data__mixup_alpha=0.2,
        data__cutmix_alpha=1.0,
        data__progressive={"start_size": 6, "until": 0.5, "step": 2},
        data__eval_size=10,
    )
    whole = small_recipe(prepared, name="whole", runs=str(tmp_path / "runs"), **changes)
    killed = small_recipe(prepared, name="killed", runs=str(tmp_path / "runs"), **changes)
    with process_group() as world:
        train(whole, world)
    # It is killed inside the first epoch, and right after the second, while it goes on.
    for wanted in ("update-8", "update-22"):
        process = start_command(killed, tmp_path)
        deadline = time.monotonic() + 300
        while not list(killed.folder.checkpoints.glob(wanted)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = start_command(killed, tmp_path)
    assert last.wait(300) == 0
    weights = [
        (recipe.folder.path / "export" / "model.safetensors").read_bytes()
        for recipe in (whole, killed)
    ]
    assert weights[0] == weights[1]
    histories = [
        [entry for entry in history(recipe) if not entry[0].startswith(TIMED)]
        for recipe in (whole, killed)
    ]
    assert sorted(histories[0]) == sorted(histories[1])
    client = mlflow.MlflowClient(killed.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("coda").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["killed", "whole"]
    for run in runs:
        assert run.info.status == "FINISHED"
        points = [
            (point.step, point.value)
            for point in client.get_metric_history(run.info.run_id, "train/loss")
        ]
        assert sorted(points) == sorted(losses(whole).items())


def _train(rank, size, port, recipe):
    stand_as(rank, size, port)
    with process_group(timeout_seconds=120) as world:
        train(recipe, world)


def test_two_processes_follow_the_loss_curve_of_one(prepared, tmp_path):
    curves = []
    for processes in (1, 2):
        recipe = small_recipe(
            prepared,
            name=f"on{processes}",
            runs=str(tmp_path / "runs"),
            training__optimizer="sgd",
            training__learning_rate=1.0,
            training__epochs=1,
            # This learns fast: a flat curve would be easy to follow.
            model__args={"rank": 2, "temperature": 1.0},
        )
        run_on(processes, _train, recipe)
        curves.append(losses(recipe))
    first, *_, last = curves[0].values()
    assert len(curves[0]) == 11
    assert last < 0.95 * first
    # At this learning rate, rounding grows to 2e-5 on some processors.
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_accumulated_micro_batches_equal_one_batch(prepared, tmp_path):
    curves = []
    with process_group() as world:
        for micro in (128, 32):
            recipe = small_recipe(
                prepared,
                name=f"micro{micro}",
                runs=str(tmp_path),
                training__micro_batch_size=micro,
                training__epochs=1,
            )
            train(recipe, world)
            curves.append(losses(recipe))
    # AdamW divides rounding errors by small second moments.
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_bf16_autocast_keeps_fp32_parameters_and_learns(prepared, tmp_path):
    recipe = small_recipe(
        prepared,
        name="bf16",
        runs=str(tmp_path),
        model__name="resnet20",
        model__args={},
        training__precision="bf16",
    )
    with process_group() as world:
        train(recipe, world)
    curve = list(losses(recipe).values())
    assert curve[-1] < 0.8 * curve[0]


def test_a_run_folder_belongs_to_one_recipe(prepared, tmp_path):
    recipe = small_recipe(prepared, runs=str(tmp_path), training__epochs=1)
    with process_group() as world:
        train(recipe, world)
        before = {path: path.stat().st_mtime_ns for path in recipe.folder.path.rglob("*")}
        other = small_recipe(
            prepared, runs=str(tmp_path), training__epochs=1, training__learning_rate=0.1
        )
        with pytest.raises(
            UserError, match=r"training\.learning_rate = 0\.003, the recipe says 0\.1"
        ):
            train(other, world)
    assert {path: path.stat().st_mtime_ns for path in recipe.folder.path.rglob("*")} == before


def test_a_loss_that_is_not_finite_ends_the_run_with_the_update(prepared, tmp_path):
    recipe = small_recipe(
        prepared,
        runs=str(tmp_path),
        model__name="resnet20",
        model__args={},
        training__learning_rate=1e30,
        training__optimizer="sgd",
    )
    message = r"loss is (nan|inf) at update (\d+)"
    with process_group() as world, pytest.raises(UserError, match=message) as error:
        train(recipe, world)
    update = int(re.search(message, str(error.value))[2])
    # The journal has the losses before it.
    assert list(losses(recipe)) == [128 * earlier for earlier in range(1, update)]
    left = recipe.folder
    assert f"at update {update}; " in left.first_error.read_text()
    assert left.recipe.is_file()
    for name in ("export", "evaluation", "checkpoints"):
        assert not getattr(left, name).exists(), name


def test_prepared_data_is_opened_once_in_a_start(prepared, tmp_path, monkeypatch):
    recipe = small_recipe(prepared, name="once", runs=str(tmp_path), training__epochs=1)
    opened, read_bytes = [], Path.read_bytes

    def counted(path):
        if path == recipe.data.folder / "manifest.json":
            opened.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    with process_group() as world:
        train(recipe, world)
    assert len(opened) == 1
    assert recipe.folder.evaluation.is_file()
