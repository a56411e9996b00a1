"""The house rules that a reader relies on: imports point one way, and three libraries each live in one room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "pipeline").rglob("*.py"))
OWNERS = {
    "deepspeed": ("training/engine.py", "training/checkpoint.py", "doctor/"),
    "ffcv": ("data/", "doctor/"),
    "mlflow": ("tracking/",),
}
MAY_IMPORT = {  # room -> what it may import of the pipeline
    "errors": set(),
    "caches": {"errors"},
    "files": {"errors"},
    "structure": {"errors"},
    "shipped": {"errors"},
    "recipe": {"errors", "structure"},
    "images": {"recipe"},
    "distributed": {"errors"},
    "models": {"models"},
    "interpret": {"interpret", "models", "errors", "distributed", "files"},
    "data": {"data", "errors", "recipe", "distributed", "files", "images", "caches"},
    "tracking": {"tracking", "errors", "recipe", "distributed", "files", "export", "interpret"},  # the last two for its pyfunc model
}


def room(path):
    return path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    inside = str(path.relative_to(ROOT / "pipeline"))
    for name in imports(path):
        top, *rest = name.split(".")
        if top in OWNERS:
            assert inside.startswith(OWNERS[top]), f"{inside} imports {name}"
        if top == "pipeline" and rest and room(path) in MAY_IMPORT:
            assert rest[0] in MAY_IMPORT[room(path)], f"{inside} imports {name}"
