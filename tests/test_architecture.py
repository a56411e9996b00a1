"""The house rules that a reader relies on.

Imports point one way, three libraries live in one room each, and files, functions and lines are
short.
"""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = ROOT / "pipeline"
FILES = sorted(PIPELINE.rglob("*.py"))
OWNERS = {
    "deepspeed": ("training/engine.py", "training/checkpoint.py", "doctor/"),
    "ffcv": ("data/ffcv_library.py", "data/encode.py", "doctor/"),
    "mlflow": ("tracking/",),
}
# Rooms from the ground up. A room imports from itself and from the floors below it; rooms of one
# floor do not know each other.
FLOORS = [
    {"errors", "slurm"},
    {"files", "log", "run_folder"},
    {"caches", "distributed", "recipe"},
    {"models"},
    {"data", "export", "interpret"},
    {"evaluation", "planning", "tracking"},
    {"reports"},
    {"training"},
    {"doctor"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# pipeline/__init__.py registers the models, and hands on the public names when they are asked for.
# Its version is everybody's.
FACE = {"models", "interpret"}
# What a file or function that is longer must say at its top, or right above.
REASON = "# Long: "


def room(path):
    return path.relative_to(PIPELINE).parts[0].removesuffix(".py")


def imports(path):
    """Dotted names of all modules, and of all names taken from a package, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PIPELINE)))
def test_imports_point_one_way(path):
    inside = str(path.relative_to(PIPELINE))
    for name in imports(path):
        top, *rest = name.split(".")
        if top in OWNERS:
            assert inside.startswith(OWNERS[top]), f"{inside} imports {name}"
        if top != "pipeline" or not rest:
            continue
        if rest == ["__version__"]:
            continue
        if room(path) == "__init__":
            assert rest[0] in FACE, f"{inside} imports {name}"
        elif rest[0] != room(path):
            assert rest[0] in LEVEL, f"{inside} imports {name}, which is no room"
            assert LEVEL[rest[0]] < LEVEL[room(path)], (
                f"{inside} imports {name}, which is not below it"
            )


def test_every_room_has_its_floor():
    assert {room(path) for path in FILES} - {"__init__"} == set(LEVEL)


def python_files():
    folders = ("pipeline", "tests", "benchmarks", "install")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 300 or any(line.startswith(REASON) for line in lines[:40]), len(lines)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            assert lines[first - 2].strip().startswith(REASON), node.name


def test_lines_end_at_100_columns():
    endings = (".py", ".sh", ".yaml", ".toml", "Makefile", "run", ".def", "Dockerfile")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    long = []
    for name in filter(None, listed.stdout.split("\0")):
        if name.endswith(endings) and (ROOT / name).is_file():
            for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
                if len(line) > 100:
                    long.append(f"{name}:{number}")
    assert not long
