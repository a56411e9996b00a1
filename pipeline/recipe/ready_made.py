"""What comes with the package beside its code: the ready-made recipes, and the job scripts for
Slurm.
"""

import difflib
from pathlib import Path

from pipeline.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_folder(name: str) -> Path:
    """The folder ``recipes`` or ``slurm``: of an installed package inside it, of a checkout at its
    root.
    """
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def recipes() -> dict[str, Path]:
    """The ready-made recipes by name."""
    return {path.stem: path for path in sorted(shipped_folder("recipes").glob("*.yaml"))}


def find_recipe(text: str) -> Path:
    """The recipe file that a user means by ``text``: a path, or the name of a ready-made recipe.

    Raises:
        UserError: it looks like a name, and there is neither such a file nor such a recipe.
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
    """The ready-made recipes, one a line, and where they and the job scripts are."""
    known = recipes()
    width = max(map(len, known), default=0)
    lines = [f"{name:{width}}  {_about(path)}" for name, path in known.items()]
    return "\n".join(
        [
            *lines,
            "",
            f"`coda train NAME` takes one as it is; to change one, copy its file: {shipped_folder('recipes')}",
            f"Job scripts for Slurm, into a folder of your own: cp -r {shipped_folder('slurm')} .",
        ]
    )


def _about(path: Path) -> str:
    """What the first line of a recipe, a comment, says of it."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()
