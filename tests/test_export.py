"""An export is loaded by timm alone, with the logits of the run."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from recipes_for_tests import small_recipe

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.export import export, load_export
from pipeline.models.create import build_model
from pipeline.recipe.schema import ModelRecipe
from pipeline.run_folder import RunFolder

ALONE = """
import sys
for name in ("deepspeed", "ffcv", "mlflow"):
    sys.modules[name] = None  # importing it fails
import timm, torch, pipeline
for folder in sys.argv[1:]:
    model = timm.create_model(f"local-dir:{folder}/export", pretrained=True).eval()
    torch.save(model(torch.load(f"{folder}/images.pt")), f"{folder}/logits.pt")
"""


def test_timm_loads_exports_without_the_training_libraries(tmp_path):
    torch.manual_seed(0)
    models = {
        "coda_s": {"rank": 3, "temperature": 77.0},
        "coda_resnet20": {"conv_stages": 1},
        "resnet20": {},
        "resnet18": {},
    }
    folders, exported, images = [tmp_path / name for name in models], [], torch.rand(2, 3, 32, 32)
    for folder, (name, args) in zip(folders, models.items(), strict=True):
        recipe = small_recipe(folder, model__name=name, model__args=args)
        exported.append(build_model(recipe.model, 7).eval())
        export(exported[-1], recipe, [f"class {i}" for i in range(7)], folder / "export")
        torch.save(images, folder / "images.pt")
    subprocess.run([sys.executable, "-c", ALONE, *map(str, folders)], check=True)
    for folder, model, args in zip(folders, exported, models.values(), strict=True):
        assert torch.equal(torch.load(folder / "logits.pt"), model(images)), folder
        again = load_export(folder / "export")
        assert again.pretrained_cfg["label_names"] == [f"class {i}" for i in range(7)]
        assert getattr(again, "temperature", 1.0) == args.get(
            "temperature", getattr(model, "temperature", 1.0)
        )


def test_an_export_replaces_an_older_one_and_leaves_nothing_else(tmp_path):
    recipe = small_recipe(tmp_path)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build_model(recipe.model, 10)
        export(model, recipe, range(10), tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert torch.equal(
        load_export(tmp_path / "export").get_classifier().up_weight,
        model.get_classifier().up_weight,
    )


def test_missing_and_damaged_exports_are_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match="holds no export"):
        RunFolder(tmp_path).find_export()
    recipe = small_recipe(tmp_path)
    export(build_model(recipe.model, 10), recipe, range(10), tmp_path / "export")
    weights = tmp_path / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_export(tmp_path / "export")
    assert main(["export", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("{", "config.json"),
        ("[]", "architecture"),
        ({"architecture": "coda_sx"}, "coda_sx"),
        ({"num_classes": 7}, "10 of 7 classes"),
        ({"model_args": [1]}, "model_args"),
        # The weights are of another rank.
        ({"model_args": {}}, "size mismatch"),
    ],
)
def test_a_damaged_description_is_one_line(tmp_path, change, said):
    recipe = small_recipe(tmp_path)
    export(build_model(recipe.model, 10), recipe, range(10), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | change) if isinstance(change, dict) else change
    )
    with pytest.raises(UserError, match=said) as error:
        load_export(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error", [TypeError("ours"), torch.OutOfMemoryError("CUDA out of memory")], ids=repr
)
def test_what_is_not_the_models_fault_is_raised(tmp_path, monkeypatch, error):
    def create_model(*_, **__):
        raise error

    recipe = small_recipe(tmp_path)
    export(build_model(recipe.model, 10), recipe, range(10), tmp_path)
    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(type(error)):
        load_export(tmp_path)
    with pytest.raises(type(error)):
        build_model(recipe.model, 10)


@pytest.mark.parametrize(
    "args",
    [{"rank": "three"}, {"rank": 0}, {"temperature": "hot"}, {"coda_width": 1.5}, {"ranks": 3}],
)
@pytest.mark.parametrize("name", ["coda_s", "coda_resnet20"])
def test_arguments_that_a_model_refuses_are_one_line(name, args):
    with pytest.raises(UserError, match=next(iter(args))):
        build_model(ModelRecipe(name, args), 10)


def test_the_names_are_timms():
    assert timm.is_model("coda_resnet50")
