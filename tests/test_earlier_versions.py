"""What earlier versions wrote is read: prepared data, a run that was stopped, a finished run.

``earlier/v0.1.0.tar.xz`` was made by version 0.1.0 (commit da9b436) from a recipe of its own: 208
random images of four colours prepared at 8 x 8 pixels; the run "finished", trained to its end,
without its checkpoints; and the run "stopped", the same recipe under another name, which was asked
to stop at update 14 of 30.
"""

import json
import tarfile
from pathlib import Path

import mlflow
import pytest
import timm
import torch
from PIL import Image

import pipeline
from pipeline.cli import main

ARCHIVE = Path(__file__).with_name("earlier") / "v0.1.0.tar.xz"


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(run):
    return timm.create_model(f"local-dir:runs/{run}/export", pretrained=True).state_dict()


def losses(run):
    lines = map(json.loads, Path("runs", run, "journal.jsonl").read_text().splitlines())
    return {line["step"]: line["value"] for line in lines if line["key"] == "train/loss"}


def test_a_run_that_was_stopped_ends_as_its_twin_did(earlier):
    assert main(["train", "runs/stopped/recipe.yaml"]) == 0
    log = losses("finished")
    assert len(log) == 30
    assert losses("stopped") == pytest.approx(log, rel=1e-4)
    finished, resumed = weights("finished"), weights("stopped")
    assert finished.keys() == resumed.keys()
    # They are equal bit by bit only on a processor like that of the archive.
    for name, weight in finished.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_prepared_data_is_whole(earlier, capsys):
    assert main(["verify", "data/imagefolder-8"]) == 0
    assert "160 images of 4 classes" in capsys.readouterr().out


def test_a_finished_run_is_evaluated_compared_and_sent(earlier, capsys):
    before = Path("runs/finished/evaluation.json").read_text()
    # All of it is in the stored results.
    assert main(["evaluate", "runs/finished"]) == 0
    assert Path("runs/finished/evaluation.json").read_text() == before
    assert main(["sync", "runs"]) == 0
    client = mlflow.MlflowClient(f"sqlite:///{earlier}/runs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("coda").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["finished", "stopped"]
    assert main(["compare", "runs/finished"]) == 0
    assert "finished" in capsys.readouterr().out


def test_an_export_explains(earlier):
    model = timm.create_model("local-dir:runs/finished/export", pretrained=True).eval()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 3])
    maps = pipeline.contributions(model, images, targets)
    logits = model(images).gather(1, targets[:, None])[:, 0]
    expected = model.temperature * (logits - model.logit_bias)
    torch.testing.assert_close(maps.flatten(1).sum(1), expected, rtol=1e-4, atol=1e-5)
    Image.new("RGB", (12, 9), (250, 190, 10)).save("amber.png")
    assert main(["explain", "runs/finished", "amber.png"]) == 0


def test_public_names_keep_their_places():
    from pipeline.interpret.explain import contributions
    from pipeline.models.dau import DAUConv2d

    assert contributions is pipeline.contributions
    assert callable(pipeline.explanation_mode)
    assert isinstance(timm.create_model("coda_xs").stage1[0], DAUConv2d)
