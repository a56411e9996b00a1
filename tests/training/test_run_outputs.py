"""Outputs of a run: the exported average, sheets of contributions, and a model in MLflow."""

import hashlib
import json

import mlflow
import pytest
import torch
from recipes_for_tests import small_recipe
from runs_for_tests import history

from pipeline.distributed import process_group
from pipeline.export import load_export
from pipeline.interpret.contributions import contributions
from pipeline.training.checkpoint_files import newest_model
from pipeline.training.run import train


def test_the_average_of_the_weights_is_what_is_evaluated_and_exported(prepared, tmp_path):
    """The average follows the weights with timm's warm-up.

    After every update n, it moves by 1 - min(decay, 1 - n^(-2/3)) of its distance to them.
    """
    from pipeline.training.learner import Learner

    recipe = small_recipe(
        prepared,
        name="average",
        runs=str(tmp_path),
        model__name="resnet20",
        model__args={},
        training__epochs=1,
        training__weight_average=0.7,
        training__checkpoint_every_updates=1,
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
    # `coda export` writes the same.
    state, _ = newest_model(recipe.folder.path / "checkpoints")
    assert all(torch.equal(state[key], value) for key, value in exported.items())


def test_every_evaluation_leaves_a_sheet_of_the_same_images(prepared, tmp_path):
    recipe = small_recipe(prepared, name="sheets", runs=str(tmp_path), training__epochs=3)
    with process_group() as world:
        train(recipe, world)
    lines = map(json.loads, (recipe.folder.path / "journal.jsonl").read_text().splitlines())
    hours = [value for name, _, value in history(recipe) if name == "speed/device_hours"]
    assert hours == sorted(hours)
    assert 0 < hours[0] < hours[-1] < 1
    sheets = [
        (line["step"], recipe.folder.path / line["value"])
        for line in lines
        if line["kind"] == "image"
    ]
    assert [step for step, _ in sheets] == [0, 1, 2, 3]
    assert all(sheet.is_file() for _, sheet in sheets)


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
