"""The report of a run: nothing is computed twice, and an interrupted evaluation continues."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch
from recipes_for_tests import small_recipe
from runs_for_tests import report

from pipeline.cli import main
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.evaluation.metrics import METRICS
from pipeline.export import export
from pipeline.models.create import build_model
from pipeline.recipe.load import load_stored
from pipeline.reports.run import applicable_methods
from pipeline.run_folder import RunFolder

SMALL = {
    "grid_size": 2,
    "grids": 3,
    "removal_images": 4,
    "alignment_images": 5,
    "completeness_images": 5,
    "batch_size": 100,
}
# With these, an untrained network is confident now and then.
ARGS = {"rank": 2, "temperature": 1.0, "logit_bias": 1.0}


def changed(recipe_folder, metrics, **evaluation):
    asked = {**SMALL, "final_metrics": list(metrics), **evaluation}
    return load_stored(
        recipe_folder, [f"evaluation.{key}={json.dumps(value)}" for key, value in asked.items()]
    )


@pytest.fixture
def exported(prepared, tmp_path):
    """An export of an untrained network."""
    recipe = small_recipe(prepared, model__args=ARGS)
    torch.manual_seed(1)
    export(build_model(recipe.model, 10), recipe, [str(c) for c in range(10)], tmp_path / "export")
    return tmp_path / "export"


@pytest.fixture
def computed(monkeypatch):
    """Metrics that are really computed, in order, with their methods."""
    names = []
    for name, metric in METRICS.items():

        def compute(subject, method, name=name, metric=metric):
            names.append((name, method))
            return metric.compute(subject, method)

        monkeypatch.setitem(METRICS, name, replace(metric, compute=compute))
    return names


def test_nothing_is_computed_twice_and_everything_stays_known(exported, computed):
    wanted = ["accuracy", "alignment", "localisation", "pixel_removal"]
    recipe = changed(exported, wanted, methods=["contributions", "gradcam"])
    first = report(exported, recipe, World())
    assert len(computed) == 6
    files = {path: path.stat().st_mtime_ns for path in exported.rglob("*") if path.is_file()}
    assert {
        "evaluation.json",
        "pixel_removal.csv",
        "alignment.pdf",
        "localisation.png",
        "methods.png",
    } <= {path.name for path in files}
    again = report(exported, recipe, World())
    assert len(computed) == 6
    assert again == first
    assert {
        path: path.stat().st_mtime_ns for path in exported.rglob("*") if path.is_file()
    } == files
    less = report(exported, changed(exported, ["completeness"]), World())
    assert computed[6:] == [("completeness", "contributions")]
    # The file keeps what is known.
    assert set(less.values) == set(first.values) | {"interp/completeness_error"}
    rows = list(csv.DictReader((exported / "tables" / "pixel_removal.csv").open()))
    assert len(rows) == 2 * 2 * 17
    assert {row["method"] for row in rows} == {
        "contributions",
        "gradcam",
    }


def test_an_interrupted_evaluation_continues(exported, computed, monkeypatch):
    recipe = changed(exported, ["accuracy", "alignment", "completeness"])
    going, alignment = dict(METRICS), METRICS["alignment"]

    def interrupted(subject, method):
        raise KeyboardInterrupt

    monkeypatch.setitem(METRICS, "alignment", replace(alignment, compute=interrupted))
    with pytest.raises(KeyboardInterrupt):
        report(exported, recipe, World())
    assert not (exported / "evaluation.json").exists()
    monkeypatch.setitem(METRICS, "alignment", going["alignment"])
    report(exported, recipe, World())
    assert [name for name, _ in computed] == ["accuracy", "alignment", "completeness"]


def test_settings_weights_and_images_decide(exported, computed, prepared, tmp_path):
    report(exported, changed(exported, ["completeness"]), World())
    report(
        exported,
        changed(exported, ["completeness"], completeness_images=6, grids=1, every_epochs=3),
        World(),
    )
    # Its own setting counts, those of other metrics do not.
    assert len(computed) == 2
    other = small_recipe(prepared, model__args={**ARGS, "temperature": 2.0})
    torch.manual_seed(1)
    # This has the same weights at another temperature.
    export(build_model(other.model, 10), other, [str(c) for c in range(10)], tmp_path / "other")
    shutil.copytree(exported / "results", tmp_path / "other" / "results")
    report(tmp_path / "other", changed(tmp_path / "other", ["completeness"]), World())
    assert len(computed) == 3
    data = tmp_path / "data"
    shutil.copytree(prepared / "data", data)
    beton = next(data.rglob("val.beton"))
    pixels = bytearray(beton.read_bytes())
    # This byte lies among the images, which no table covers.
    pixels[len(pixels) // 2] ^= 255
    beton.write_bytes(pixels)
    moved = load_stored(
        exported,
        [
            f"data.prepared={data}",
            "evaluation.final_metrics=[completeness]",
            "evaluation.completeness_images=5",
        ],
    )
    report(exported, moved, World())
    assert len(computed) == 4


def test_methods_that_do_not_apply(exported):
    assert set(applicable_methods(RunFolder(exported))) >= {
        "contributions",
        "gradcam",
        "occlusion_9",
    }
    assert not {"guided_backprop", "deep_lift"} & set(applicable_methods(RunFolder(exported)))
    with pytest.raises(UserError, match="deep_lift"):
        report(exported, changed(exported, ["localisation"], methods=["deep_lift"]), World())
    assert not (exported / "results").exists()


def test_the_command_line_evaluates_into_the_same_run(prepared, tmp_path, capsys):
    from pipeline.tracking.sender import mlflow_client

    recipe = small_recipe(
        tmp_path, data__prepared=str(prepared / "data"), training__epochs=1, model__args=ARGS
    )
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.to_dict()))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    run = str(recipe.folder.path)
    settings = [f"evaluation.{key}={value}" for key, value in SMALL.items()]
    before = (recipe.folder.path / "run_id").read_text()
    assert (
        main(
            ["evaluate", run, "--metrics", "all", "--methods", "contributions,gradient", *settings]
        )
        == 0
    )
    client = mlflow_client(recipe.tracking_uri)
    mlflow_run = client.get_run(before)
    values = json.loads((recipe.folder.evaluation).read_text())["values"]
    assert mlflow_run.info.status == "FINISHED"
    assert "interp/gradient/pixel_removal_most" in values
    assert {name: mlflow_run.data.metrics[name] for name in values} == pytest.approx(values)
    assert [run.info.run_id for run in client.search_runs([mlflow_run.info.experiment_id])] == [
        before
    ]
    assert "tables/pixel_removal.csv" in [
        item.path for item in client.list_artifacts(before, "tables")
    ]
    assert main(["evaluate", run, "--methods", "gradients"]) == 2
    assert "evaluation.methods is 'gradients'; valid: contributions" in capsys.readouterr().err
