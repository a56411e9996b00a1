"""Whole trainings: killed and continued, on one process and two, in parts and at once."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from processes import run_on, stand_as
from recipes_for_tests import small_recipe

from pipeline.distributed import process_group
from pipeline.errors import UserError
from pipeline.export import load_export
from pipeline.interpret.contributions import contributions
from pipeline.training.checkpoint import newest_model
from pipeline.training.run import train

# what a clock says is not reproducible
TIMED = ("speed/",)


def history(recipe):
    """Metrics in the run's journal, [(name, step, value)] in the order in which they were written."""
    lines = [
        json.loads(line) for line in (recipe.folder.path / "journal.jsonl").read_text().splitlines()
    ]
    return [
        (line["key"], line["step"], line["value"]) for line in lines if line["kind"] == "metric"
    ]


def losses(recipe):
    return {step: value for name, step, value in history(recipe) if name == "train/loss"}


def command(recipe, folder, processes=1):
    """A `coda train` of ``recipe`` as a new process (or several under torchrun)."""
    path = folder / f"{recipe.name}.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else []
    )
    with (folder / f"{recipe.name}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "pipeline", "train", str(path)],
            stdout=log,
            stderr=log,
        )


def test_killed_and_started_again_ends_as_if_it_had_never_stopped(prepared, tmp_path):
    changes = dict(
        model__name="coda_resnet20",
        model__args={"rank": 2},
        training__epochs=3,
        training__checkpoint_every_updates=4,
    )
    changes |= dict(
        data__rand_augment_operations=1,
        data__color_jitter=0.3,
        data__mixup_alpha=0.2,
        data__cutmix_alpha=1.0,
    )
    changes |= dict(
        data__progressive={"start_size": 6, "until": 0.5, "step": 2}, data__eval_size=10
    )
    whole = small_recipe(prepared, name="whole", runs=str(tmp_path / "runs"), **changes)
    killed = small_recipe(prepared, name="killed", runs=str(tmp_path / "runs"), **changes)
    with process_group() as world:
        train(whole, world)
    # inside the first epoch, and right after the second, while it goes on
    for wanted in ("update-8", "update-22"):
        process = command(killed, tmp_path)
        deadline = time.monotonic() + 300
        while not list((killed.folder.checkpoints).glob(wanted)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = command(killed, tmp_path)
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
        changes = {
            "training__optimizer": "sgd",
            "training__learning_rate": 1.0,
            "training__epochs": 1,
        }
        # learns fast: a curve that stands still is easy to follow
        changes["model__args"] = {"rank": 2, "temperature": 1.0}
        recipe = small_recipe(
            prepared, name=f"on{processes}", runs=str(tmp_path / "runs"), **changes
        )
        run_on(processes, _train, recipe)
        curves.append(losses(recipe))
    first, *_, last = curves[0].values()
    assert len(curves[0]) == 11 and last < 0.95 * first
    # at this rate rounding grows: 2e-5 on some processors
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
    # clipped AdamW divides rounding by small second moments
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


def test_the_average_of_the_weights_is_what_is_evaluated_and_exported(prepared, tmp_path):
    """After every update n the average moves by 1 - min(decay, 1 - n^(-2/3)) of its distance to the
    weights (timm's warm-up).
    """
    from pipeline.training.learner import Learner

    changes = dict(
        model__name="resnet20",
        model__args={},
        training__weight_average=0.7,
        training__checkpoint_every_updates=1,
    )
    recipe = small_recipe(
        prepared, name="average", runs=str(tmp_path), training__epochs=1, **changes
    )
    seen = []
    original = Learner.update

    def update(learner, *arguments):
        loss = original(learner, *arguments)
        state = learner.engine.module.state_dict()
        seen.append({key: value.clone() for key, value in state.items()})
        return loss

    with process_group() as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "update", update)
        train(recipe, world)
    expected = seen[0]
    for number, weights in enumerate(seen[1:], start=2):
        share = 1 - min(0.7, 1 - number ** (-2 / 3))
        expected = {
            key: torch.lerp(expected[key].double(), value.double(), share)
            for key, value in weights.items()
        }
    exported = load_export(recipe.folder.path / "export").state_dict()
    for key, value in exported.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[key].float(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(exported["stem.conv1.weight"], seen[-1]["stem.conv1.weight"])
    # what `coda export` writes
    state, _ = newest_model(recipe.folder.path / "checkpoints")
    assert all(torch.equal(state[key], value) for key, value in exported.items())


def test_every_evaluation_leaves_a_sheet_of_the_same_images(prepared, tmp_path):
    recipe = small_recipe(prepared, name="sheets", runs=str(tmp_path), training__epochs=3)
    with process_group() as world:
        train(recipe, world)
    lines = map(json.loads, (recipe.folder.path / "journal.jsonl").read_text().splitlines())
    hours = [value for name, _, value in history(recipe) if name == "speed/device_hours"]
    assert hours == sorted(hours) and 0 < hours[0] < hours[-1] < 1
    sheets = [
        (line["step"], recipe.folder.path / line["value"])
        for line in lines
        if line["kind"] == "image"
    ]
    assert [step for step, _ in sheets] == [0, 1, 2, 3] and all(
        sheet.is_file() for _, sheet in sheets
    )


def test_mlflow_has_a_registered_model_that_predicts_and_explains(prepared, tmp_path):
    recipe = small_recipe(prepared, name="registered", runs=str(tmp_path), training__epochs=1)
    with process_group() as world:
        train(recipe, world)
    client = mlflow.MlflowClient(recipe.tracking_uri)
    (version,) = client.search_model_versions("name = 'coda_s'")
    assert version.run_id == (recipe.folder.path / "run_id").read_text()
    top1 = next(value for name, _, value in history(recipe) if name == "val/top1")
    tags = client.get_run(version.run_id).data.tags
    assert (
        tags["data/manifest_sha256"]
        == hashlib.sha256((recipe.data.folder / "manifest.json").read_bytes()).hexdigest()
    )
    assert float(version.tags["val/top1"]) == pytest.approx(top1, rel=1e-5)
    mlflow.set_tracking_uri(recipe.tracking_uri)
    try:
        served = mlflow.pyfunc.load_model(f"models:/coda_s/{version.version}")
    finally:
        mlflow.set_tracking_uri(None)
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = served.predict(images.numpy(), params={"explain": True})
    model = load_export(recipe.folder.path / "export")
    with torch.no_grad():
        logits = model(images)
    classes = logits.argmax(1)
    torch.testing.assert_close(torch.from_numpy(found["probabilities"]), logits.sigmoid())
    torch.testing.assert_close(
        torch.from_numpy(found["contributions"]), contributions(model, images, classes).sum(1)
    )
    complete = model.temperature * (logits.gather(1, classes[:, None])[:, 0] - model.logit_bias)
    torch.testing.assert_close(
        torch.from_numpy(found["contributions"]).sum((1, 2)), complete, rtol=1e-3, atol=1e-4
    )
    assert set(served.predict(images.numpy())) == {"probabilities"}


def test_a_run_folder_belongs_to_one_recipe(prepared, tmp_path):
    recipe = small_recipe(prepared, runs=str(tmp_path), training__epochs=1)
    with process_group() as world:
        train(recipe, world)
        before = {path: path.stat().st_mtime_ns for path in recipe.folder.path.rglob("*")}
        with pytest.raises(UserError, match=r"training.learning_rate = 0.003, the recipe says 0.1"):
            train(
                small_recipe(
                    prepared, runs=str(tmp_path), training__epochs=1, training__learning_rate=0.1
                ),
                world,
            )
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
    with (
        process_group() as world,
        pytest.raises(UserError, match=r"loss is (nan|inf) at update \d+"),
    ):
        train(recipe, world)
    assert os.listdir(recipe.folder)


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
    assert len(opened) == 1 and recipe.folder.evaluation.is_file()
