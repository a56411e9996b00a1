"""Recipes: every ready-made one loads, and every mistake is one line with the remedy."""

import dataclasses
import typing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from recipes_for_tests import small_recipe

from pipeline.errors import UserError
from pipeline.recipe.checks import ranges
from pipeline.recipe.load import from_dict, load, load_stored
from pipeline.recipe.page import field_docstrings, page
from pipeline.recipe.schema import DataRecipe, Recipe, flatten

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "recipes" / "digits_coda_resnet20.yaml"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_ready_made_recipes_load_and_survive_a_round_trip(path):
    recipe = load(path)
    assert recipe.name == path.stem
    assert from_dict(recipe.to_dict()) == recipe
    assert f"coda train recipes/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_one_epoch_works_on_every_recipe(path, caplog):
    training, stated = load(path, ["training.epochs=1"]).training, load(path).training
    assert training.epochs == 1
    assert training.warmup_epochs < 1
    if stated.warmup_epochs < 1:
        assert training.warmup_epochs == stated.warmup_epochs
        assert not caplog.messages
        return
    assert training.warmup_epochs == pytest.approx(stated.warmup_epochs / stated.epochs, rel=0.05)
    assert caplog.messages == [
        f"training.warmup_epochs {stated.warmup_epochs:g} does not fit 1 epoch: "
        f"{training.warmup_epochs:g} is used, the same share as in {path}; "
        "say training.warmup_epochs=... for another"
    ]


@pytest.mark.parametrize(
    ("overrides", "warmup", "said"),
    [
        # It is 2 of 30 epochs in the file, and would have filled both.
        (["training.epochs=2"], 0.13, True),
        (["training.epochs=3"], 2, False),
        (["training.epochs=90"], 2, False),
        (["training.epochs=2", "training.warmup_epochs=2"], 2, False),
        (["training.warmup_epochs=0", "training.epochs=1"], 0, False),
    ],
)
def test_a_warm_up_that_no_longer_fits_keeps_its_share(overrides, warmup, said, caplog):
    recipe = load(DIGITS, overrides)
    assert recipe.training.warmup_epochs == warmup
    assert bool(caplog.messages) == said


def test_a_run_with_a_shortened_warm_up_goes_on(tmp_path):
    recipe = load(DIGITS, ["training.epochs=1"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_stored(tmp_path).identity() == recipe.identity()


def test_a_stated_warm_up_that_does_not_fit_is_refused_with_what_would():
    remedy = (
        r"warmup_epochs is 5\.0; it must be between 0 and epochs, so at most 1, "
        r"e\.g\. training\.warmup_epochs=0\.05"
    )
    with pytest.raises(UserError, match=remedy):
        load(DIGITS, ["training.epochs=1", "training.warmup_epochs=5"])


def test_overrides_reach_every_level():
    recipe = load(
        DIGITS,
        [
            "seed=3",
            "training.learning_rate=1e-3",
            "model.args.rank=4",
            "data.path=null",
            "training.epochs=7",
        ],
    )
    assert (
        recipe.seed,
        recipe.training.learning_rate,
        recipe.model.args["rank"],
        recipe.data.path,
    ) == (3, 1e-3, 4, None)
    assert recipe.training.epochs == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainig.epochs=3", "unknown key trainig; did you mean training?"),
        ("training.epoch=3", "unknown key training.epoch; did you mean training.epochs?"),
        ("training.epochs=three", "training.epochs is 'three'; it must be a whole number"),
        ("training.epochs=true", "training.epochs is True"),
        ("training.epochs=0", "at least 1"),
        ("training.optimizer=lamb", "valid: adam, adamw, sgd, muon"),
        ("training.precision=fp16", "valid: fp32, bf16"),
        ("training.zero_stage=3", "0, 1 or 2"),
        ("data.rand_augment_magnitude=31", "between 0 and 30"),
        ("data.eval_size=0", "data.eval_size is 0; it must be at least 1"),
        ("data.cutmix_alpha=-1", "data.cutmix_alpha is -1.0; it must be 0"),
        (
            "data.progressive={start_size: 48}",
            "data.progressive.start_size is 48; it must be between 1 and data.image_size",
        ),
        ("data.progressive={until: 0.5}", "data.progressive.start_size is missing"),
        ("training.learning_rate=.nan", "positive and finite"),
        ("training.warmup_epochs=1000", "between 0 and epochs"),
        ("training.warmup_epochs=-1", "training.warmup_epochs is -1.0; it must be 0 (off) or more"),
        ("training.warmup_epochs=.nan", "training.warmup_epochs is nan; it must be 0 (off)"),
        ("training.warmup_learning_rate=1", "between 0 and training.learning_rate"),
        ("training.momentum=1", "training.momentum is 1.0; it must be in [0, 1)"),
        ("training.step_factor=.inf", "it must be at least 1, and finite"),
        ("training.micro_batch_size=0", "training.micro_batch_size is 0; it must be at least 1"),
        ("data.jpeg_quality=101", "between 1 and 100"),
        ("data.max_resolution=16385", "between 1 and 16,384"),
        ("data.crop_padding=32", "data.crop_padding is 32; it must be below data.image_size, 32"),
        ("data.scratch=/tmp", "null, as data.storage is not stage_local"),
        ("data.progressive={start_size: 16, until: 0}", "data.progressive.until is 0.0"),
        ("data.progressive={start_size: 16, step: 17}", "the difference of the sizes, 16"),
        ("evaluation.methods=[]", "a list of one or more"),
        ("evaluation.grid_size=1", "evaluation.grid_size is 1; it must be at least 2"),
        ("tracking.parent=a'b", "text without quotes"),
        ("evaluation.metrics=[accuracy, beauty]", "'beauty'"),
        ("name=a/b", "a single folder name"),
        ("model=resnet20", "must be a section"),
        ("name.first=a", "is a value, not a section"),
        ("seed", "must look like section.key=value"),
        ("seed=[", "not valid YAML"),
        ("data.source=null", "data.source is None"),
    ],
)
def test_mistakes_are_one_clear_line(override, message):
    with pytest.raises(UserError) as error:
        load(DIGITS, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_muon_needs_whole_matrices():
    message = r"training\.optimizer is 'muon'; it must be another one, or training\.zero_stage 0"
    with pytest.raises(UserError, match=message):
        load(DIGITS, ["training.optimizer=muon", "training.zero_stage=1"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "must be a mapping"),
        ("name: [\n", "not valid YAML"),
        ("name: a\n", "is missing"),
        (b"\xff\xfe", "UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_the_global_batch_is_the_same_for_every_world_size():
    recipe = load(DIGITS, ["training.global_batch_size=96"])
    assert recipe.micro_batch(1) == (96, 1)
    assert recipe.micro_batch(4) == (24, 1)
    recipe = load(DIGITS, ["training.global_batch_size=96", "training.micro_batch_size=8"])
    assert recipe.micro_batch(4) == (8, 3)
    with pytest.raises(UserError, match="not a multiple of micro batch 8 x 5"):
        recipe.micro_batch(5)


def test_only_what_decides_the_weights_identifies_a_run():
    recipe = load(DIGITS)
    elsewhere = load(
        DIGITS,
        [
            "data.workers=1",
            "runs=/elsewhere",
            "evaluation.grids=7",
            "tracking.uri=http://localhost:1",
        ],
    )
    assert recipe.identity() == elsewhere.identity()
    assert recipe.identity() != dataclasses.replace(recipe, seed=9).identity()


@dataclass(frozen=True)
class _Wider(DataRecipe):
    """Data settings of a later version, with keys that begin like ones that decide nothing."""

    path_rule: str = "any"
    workers_rule: str = "any"


def test_only_whole_keys_are_left_out_of_the_identity(tmp_path):
    recipe = small_recipe(tmp_path)
    wider = replace(recipe, data=_Wider(**vars(recipe.data)))
    assert set(wider.identity()) - set(recipe.identity()) == {"data.path_rule", "data.workers_rule"}
    free = set(flatten(recipe.to_dict())) - set(recipe.identity())
    assert {"runs", "data.path", "data.workers", "evaluation.grids", "tracking.uri"} <= free
    assert not free & {"name", "seed", "data.source", "training.epochs"}


def _sections(cls=Recipe):
    """``cls`` and the dataclasses of its fields."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from _sections(inner)


def test_every_number_has_a_range():
    for section in _sections():
        for name, hint in typing.get_type_hints(section, include_extras=True).items():
            plain = typing.get_type_hints(section)[name]
            if {int, float} & {plain, *typing.get_args(plain)}:
                assert list(ranges(hint)), f"{section.__name__}.{name} may be any number"


def test_defaults_are_in_their_ranges():
    for section in _sections():
        hints = typing.get_type_hints(section, include_extras=True)
        for field in dataclasses.fields(section):
            if field.default not in (None, dataclasses.MISSING):
                assert all(valid.allows(field.default) for valid in ranges(hints[field.name]))


def test_every_field_has_its_docstring():
    for section in _sections():
        texts = field_docstrings(section)
        for field in dataclasses.fields(section):
            assert texts.get(field.name, "").endswith("."), f"{section.__name__}.{field.name}"


def test_the_page_is_made_from_the_schema():
    written = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    remedy = "docs/recipe.md is old: python -m pipeline.recipe.page > docs/recipe.md"
    assert written == page(), remedy
    assert all(len(line) <= 100 for line in written.splitlines())


def test_the_page_names_every_key():
    text = page()
    for section in _sections():
        assert all(f"- **`{field.name}`** (" in text for field in dataclasses.fields(section))
