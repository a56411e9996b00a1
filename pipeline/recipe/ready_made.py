"""Files that come with the package: the ready-made recipes, and the job scripts for Slurm."""

import difflib
from pathlib import Path

from pipeline.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_folder(name: str) -> Path:
    """Find the folder ``recipes`` or ``slurm``.

    An installed package holds them inside, a checkout at its root.
    """
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def recipes() -> dict[str, Path]:
    """The ready-made recipes by name."""
    return {path.stem: path for path in sorted(shipped_folder("recipes").glob("*.yaml"))}


def find_recipe(text: str) -> Path:
    """Find the recipe file that a user means by ``text``, a path or a ready-made recipe's name.

    Raises:
        UserError: the text looks like a name, and there is neither such a file nor such a recipe.
    """
    path, known = Path(text), recipes()
    if path.is_file() or path.name != text or path.suffix:
        return path
    if text in known:
        return known[text]
    close = difflib.get_close_matches(text, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "`coda recipes` lists the names"
    raise UserError(
        f"recipe {text}: there is no such file, and no ready-made recipe of that name; {hint}"
    )


def listing() -> str:
    """List the ready-made recipes, one a line, and say where they and the job scripts are."""
    known = recipes()
    width = max(map(len, known), default=0)
    lines = [f"{name:{width}}  {_first_line(path)}" for name, path in known.items()]
    lines += [
        "",
        "`coda train NAME` takes one as it is; to change one, copy its file: "
        f"{shipped_folder('recipes')}",
        f"Job scripts for Slurm, into a folder of your own: cp -r {shipped_folder('slurm')} .",
    ]
    return "\n".join(lines)


def _first_line(path: Path) -> str:
    """Read the first line of a recipe, a comment that says what it trains."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()
