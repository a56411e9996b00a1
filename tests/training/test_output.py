"""What the commands print is for their user: nothing of the libraries, nothing twice."""

import subprocess
import sys

import pytest
import yaml
from output import STDERR, STDOUT, noise
from recipes_for_tests import small_recipe


@pytest.fixture(scope="module")
def recipe(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    metrics = {"final_metrics": ["accuracy", "alignment", "depth"], "methods": ["contributions", "gradcam"], "grids": 2, "grid_size": 2}
    recipe = small_recipe(folder, data__prepared=str(prepared / "data"), training__epochs=1, evaluation=metrics)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("command", ["train", "train again", "compare"])
def test_nothing_but_what_is_for_the_user(recipe, command):
    words = ["compare", str(recipe.parent / "runs" / "small")] if command == "compare" else ["train", str(recipe)]
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert noise(done.stderr, STDERR) == [] and noise(done.stdout, STDOUT) == []
    assert ("resumed" in done.stdout) == (command == "train again")


def test_a_new_warning_is_seen():
    assert noise("UserWarning: something new", STDERR) and noise("loading needs 1 GB", STDERR)
    assert noise("Pictures:\nPictures:\n", STDOUT) == ["Pictures:"]
