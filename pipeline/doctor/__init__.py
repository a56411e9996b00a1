"""``coda doctor``: try every building block on this machine, and say what mends those that fail.

Each check does the real thing in small: images are prepared and decoded, tensors are summed by two
processes, an engine takes a step, a run is tracked. What needs packages runs in processes of its
own (``worker.py``), which may hang or crash; this package and ``machine`` need the standard library
only.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from pipeline.doctor import machine, remedies
from pipeline.doctor.parts import AFTER, LANES, PACKAGE, Check, State
from pipeline.doctor.remote import Worker

OLDEST_PYTHON = (3, 11)
# The process ends with the highest code of its checks.
EXIT_CODES = {State.OK: 0, State.UNKNOWN: 1, State.FAILED: 2}


class Wanted(NamedTuple):
    """The folders and addresses to check."""

    runs: Path
    """Folder of the runs."""
    tracking: dict[str, str]
    """Name of a setting or variable -> MLflow's address in it."""
    data: Path | None = None
    """Folder of the recipe's prepared files."""


def main(runs: Path, recipe: str | None = None, overrides: Sequence[str] = ()) -> int:
    """Print a line per check as it finishes.

    Args:
        runs: folder of the runs, which need not exist yet; with a recipe, the recipe's is meant.
        recipe: a file; its folders and its tracking address are checked, too.
        overrides: of the recipe, ``section.key=value``.

    Returns:
        The exit code: 0 if all is well, 2 if a check failed, 1 if one could not be made.

    Raises:
        UserError: the recipe is not valid, or CODA_DOCTOR_SECONDS is not a number of seconds.
    """
    seconds = machine.seconds()
    code = 0
    for check in checks(runs, recipe, overrides, seconds):
        print(f"{check.state.value:8}{check.name}: {check.detail}", flush=True)
        if check.remedy and check.state is not State.OK:
            print(f"{'':8}-> {check.remedy}", flush=True)
        code = max(code, EXIT_CODES[check.state])
    return code


def checks(
    runs: Path,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    seconds: float = machine.SECONDS,
) -> Iterator[Check]:
    """Make all checks, one after another, in ``seconds``; those not done by then are UNKNOWN."""
    end = time.monotonic() + seconds
    remedy = remedies.remedies(remedies.surroundings())
    wanted = Wanted(runs, machine.tracking_variable())
    if recipe:
        try:
            wanted = _of_recipe(recipe, overrides)
        except ImportError as error:
            detail = f"cannot be read: {error}"
            yield Check("recipe", State.FAILED, detail, remedy("timm", str(error)))

    quick: dict[str, Callable[[], str]] = {
        "python": lambda: machine.python(OLDEST_PYTHON),
        "memory": machine.memory,
        "processors": machine.processors,
        "runs folder": lambda: machine.runs_folder(wanted.runs),
        "/dev/shm": machine.shared_memory,
        "caches": machine.caches,
    }
    if (data := wanted.data) is not None:
        quick["data folder"] = lambda: machine.data_folder(data)
    done: dict[str, Check] = {}
    for name, probe in quick.items():
        done[name] = _check(name, probe, remedy)
        yield done[name]

    writable = done["runs folder"].state is State.OK
    folder = machine.existing(wanted.runs) if writable else Path(tempfile.gettempdir())
    names = [name for lane in (("torch", "torchvision", "timm"), *LANES) for name in lane]
    missing = [name for name in names if name in PACKAGE and not find_spec(PACKAGE[name])]
    tried = [name for name in names if name not in missing]
    with Worker(tried, folder, wanted.tracking, end, seconds) as worker:
        for name in [*names, *wanted.tracking]:
            before = AFTER.get(name, AFTER["tracking"])
            needed = next((other for other in before if done[other].state is not State.OK), None)
            if name in missing:
                state, detail = State.FAILED, f"the Python package {PACKAGE[name]} is not installed"
            elif needed:
                state, detail = State.UNKNOWN, f"cannot be tried without {needed}, see there"
            else:
                state, detail = worker.answer(name)
            detail = machine.without_passwords(detail)
            advice = "" if needed and name not in missing else remedy(name, detail)
            done[name] = Check(name, state, detail, advice)
            yield done[name]


def _check(name: str, probe: Callable[[], str], remedy: Callable[[str, str], str]) -> Check:
    try:
        return Check(name, State.OK, probe(), "")
    except Exception as error:
        # A failure of any kind is what the doctor reports.
        detail = machine.one_line(error)
        return Check(name, State.FAILED, detail, remedy(name, detail))


def _of_recipe(path: str, overrides: Sequence[str]) -> Wanted:
    from pipeline.recipe.load import load

    recipe = load(path, overrides)
    address = recipe.tracking.uri
    tracking = {"tracking.uri": address} if address else machine.tracking_variable()
    return Wanted(Path(recipe.runs), tracking, recipe.data.folder)
