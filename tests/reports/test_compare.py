"""Comparisons: the same numbers in the table, on the page, in the picture and in MLflow."""

import json
import re
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from PIL import Image
from recipes_for_tests import small_recipe

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.reports.closing import closing, table
from pipeline.reports.compare import mlflow_pages, write_comparison
from pipeline.reports.compared import differences, find_runs
from pipeline.reports.figures import RecipeCurves


def evaluated(runs, name, uri, top1, *, rank=2, seed=0, experiment="digits", parent=None):
    """Folder of a run that was evaluated, as far as a comparison reads it."""
    args = {"rank": rank, "temperature": 10.0}
    recipe = small_recipe(
        runs,
        name=name,
        seed=seed,
        runs=str(runs),
        model__args=args,
        tracking={"uri": uri, "experiment": experiment, "parent": parent},
    )
    folder = recipe.folder.path
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    values = {
        "val/top1": top1,
        "interp/localisation": 0.3 * top1,
        "interp/localisation_junction": 0.8,
        "interp/completeness_error": 2e-7,
    }
    curve = [
        {"method": "contributions", "distance": d, "mean": 0.9 - 0.6 * d} for d in (0.2, 0.6, 1.0)
    ]
    (folder / "evaluation.json").write_text(
        json.dumps({"grid_size": 3, "values": values, "tables": {"depth": curve}})
    )
    for file, text in (("run_id", f"id-{name}"), ("experiment_id", "7")):
        (folder / file).write_text(text)
    (folder / "pictures").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "pictures" / "contributions.png")
    return folder


def test_the_same_comparison_as_text_page_and_picture(tmp_path):
    for name, top1, rank in (("low", 0.75, 2), ("high", 0.9, 4)):
        evaluated(tmp_path, name, "http://mlflow.lab:5000", top1, rank=rank)
    runs = find_runs([str(tmp_path / "low"), str(tmp_path / "high")], tmp_path)
    assert differences(runs) == {"model.args.rank": ["2", "4"]}
    assert re.search(r"low +0\.7500 +2\.0e-07 +0\.2250 +0\.8000", table(runs))
    assert "chance 0.111" in table(runs)
    page = write_comparison(runs, tmp_path / "out").read_text()
    for shown in (
        "0.7500",
        "0.2250",
        "<td>model.args.rank</td><td>2</td><td>4</td>",
        "id-low",
        "low: contributions",
    ):
        assert shown in page
    assert page.count("data:image/png;base64,") == 3
    assert 'src="http' not in page
    assert "<script" not in page
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(2**20)) > 50
    assert (tmp_path / "out" / "comparison.pdf").read_bytes().startswith(b"%PDF")


def test_seeds_of_one_recipe_are_averaged(tmp_path):
    for name, top1, rank, seed in (
        ("a", 0.7, 2, 0),
        ("b", 0.8, 2, 1),
        ("c", 0.9, 2, 2),
        ("other", 0.5, 4, 0),
    ):
        evaluated(tmp_path, name, "http://mlflow.lab:5000", top1, rank=rank, seed=seed)
    runs = find_runs([str(tmp_path / name) for name in ("a", "other", "b", "c")], tmp_path)
    *_, mean, _, _ = table(runs).splitlines()
    assert re.fullmatch(
        r"a and 2 more +0\.8000 ± 0\.1000 +2\.0e-07 ± 0\.0e\+00 +0\.2400 ± 0\.0300 "
        r"+0\.8000 ± 0\.0000 +- +-",
        mean,
    )
    assert "<td>0.8000 ± 0.1000</td>" in write_comparison(runs, tmp_path / "out").read_text()


def test_scores_of_a_layer_come_together():
    runs = RecipeCurves("two", [], [[(0.5, 0.2), (0.1, 0.8)], [(0.1, 0.6), (0.5, 0.4)]])
    assert runs.points == [(0.1, [0.8, 0.6]), (0.5, [0.2, 0.4])]
    assert RecipeCurves("none", [{}], []).points == []


def test_mlflow_shows_exactly_these_runs(tmp_path):
    for name in ("a", "b"):
        evaluated(tmp_path, name, "http://mlflow.lab:5000/", 0.5)
    evaluated(tmp_path, "c", None, 0.5)
    runs = find_runs([str(tmp_path / name) for name in "abc"], tmp_path)
    local, served = sorted(mlflow_pages(runs))
    assert served[1] is None
    assert local[1] == f"coda serve --backend-store-uri sqlite:///{tmp_path / 'mlflow.db'}"
    address = urlsplit(urlsplit(served[0]).fragment)
    query = parse_qs(address.query)
    assert served[0].startswith("http://mlflow.lab:5000/#/")
    assert address.path == "/experiments/7/runs"
    assert query["compareRunsMode"] == ["CHART"]
    assert query["searchFilter"] == ["attributes.run_id IN ('id-a', 'id-b')"]
    assert local[0].startswith("http://127.0.0.1:5000/#/experiments/7/runs?")
    assert "id-c" in local[0]


def test_a_command_ends_with_what_to_do_next(tmp_path, monkeypatch):
    for name, uri in (("a", "http://mlflow.lab:5000"), ("b", None), ("c", None)):
        evaluated(tmp_path / "runs", name, uri, 0.5)
    (tmp_path / "runs" / "c" / "run_id").unlink()
    (tmp_path / "runs" / "c" / "journal.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", str(tmp_path / "venv" / "bin" / "python"))
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "coda").touch()
    text = closing(
        find_runs(["runs/a", "runs/b", "runs/c"], tmp_path), tmp_path / "runs" / "comparison.html"
    )
    lines = text.split("Pictures:\n")[1].splitlines()
    assert lines[:3] == [
        "  runs/comparison.html",
        "  runs/comparison.png",
        "  runs/a/pictures/contributions.png",
    ]
    commands = [line.strip() for line in lines if line.startswith("  venv")]
    assert commands == [
        "venv/bin/coda explain runs/a IMAGE",
        "venv/bin/coda sync runs/c",
        "venv/bin/coda serve",
    ]
    assert "      http://mlflow.lab:5000/#/" in text
    assert "      http://127.0.0.1:5000/#/" in text
    monkeypatch.setenv("PATH", str(tmp_path / "venv" / "bin"))
    (tmp_path / "venv" / "bin" / "coda").chmod(0o755)
    assert "  coda explain runs/a IMAGE" in closing(find_runs(["runs/a"], tmp_path))


def test_an_experiment_and_a_sweep_name_their_runs(tmp_path):
    for name, experiment, parent in (
        ("a", "digits", None),
        ("b", "digits", "ranks"),
        ("c", "other", "ranks"),
    ):
        evaluated(tmp_path, name, None, 0.5, experiment=experiment, parent=parent)
    names = {
        word: [run.recipe.name for run in find_runs([word], tmp_path)]
        for word in ("digits", "ranks")
    }
    assert names == {"digits": ["a", "b"], "ranks": ["b", "c"]}
    assert [run.recipe.name for run in find_runs([str(tmp_path / "c"), "ranks"], tmp_path)] == [
        "c",
        "b",
    ]
    with pytest.raises(
        UserError, match=r"nothing: is not a run's folder.*experiments there: digits, other"
    ):
        find_runs(["nothing"], tmp_path)


def test_the_command_opens_what_it_prints(tmp_path, monkeypatch, capsys):
    import webbrowser

    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    evaluated(tmp_path, "a", "http://mlflow.lab:5000", 0.5)
    evaluated(tmp_path, "b", None, 0.5)
    assert main(["compare", str(tmp_path / "a"), "--open"]) == 0
    assert len(opened) == 1
    assert opened[0].startswith("http://mlflow.lab:5000/#/")
    assert opened[0] in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "b"), "--open", "--output", str(tmp_path / "out")]) == 0
    assert opened[1:] == [(tmp_path / "out" / "comparison.html").as_uri()]
    assert " serve --backend-store-uri sqlite:///" in capsys.readouterr().out
