"""The command line: ``coda`` or ``python -m pipeline``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 with one line on stderr for a user's mistake, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except UserError as error:
        print(f"coda: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("coda: interrupted; the same command continues a training from its newest checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="coda", description="Train image classifiers that explain themselves.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command("doctor", _doctor, "Check this machine, with the remedy beside each failure.")
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (its disk is checked)")
    for name, run, text in (
        ("prepare", _prepare, "Write the .beton files of a recipe's data set."),
        ("train", _train, "Train a recipe, or continue where it was stopped; ends with export, evaluation and pictures."),
    ):
        sub = command(name, run, text)
        sub.add_argument("recipe", help="YAML file, see recipes/")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.epochs=3")
    sub = command("export", _export, "Write the newest checkpoint of a run as model.safetensors + config.json.")
    sub.add_argument("folder", type=Path, metavar="RUN")
    sub = command("evaluate", _evaluate, "Evaluate the export of a run again; writes evaluation.json and pictures.")
    sub.add_argument("folder", type=Path, metavar="RUN|EXPORT")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="such as evaluation.grids=500")
    sub = command("compare", _compare, "Show evaluated runs beside each other.")
    sub.add_argument("folders", type=Path, nargs="+", metavar="RUN")
    sub = command("sync", _sync, "Send what MLflow has not received of a run.")
    sub.add_argument("folder", type=Path, metavar="RUN")
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from pipeline import doctor

    return doctor.main(options.runs)


def _prepare(options: argparse.Namespace) -> None:
    from pipeline.data.write import prepare
    from pipeline.recipe import load

    print(prepare(load(options.recipe, options.overrides)))


def _train(options: argparse.Namespace) -> None:
    from pipeline.distributed import process_group
    from pipeline.recipe import load
    from pipeline.results import compare

    recipe = load(options.recipe, options.overrides)
    with process_group() as world:
        from pipeline.training.loop import train  # imports deepspeed, which reads what process_group sets

        train(recipe, world)
        if world.is_main:
            print(compare([recipe.folder]))


def _export(options: argparse.Namespace) -> None:
    from pipeline.export import FOLDER, export
    from pipeline.recipe import load_stored
    from pipeline.training.checkpoint import newest_model
    from pipeline.training.model import build_model

    recipe = load_stored(options.folder)
    state, classes = newest_model(options.folder / "checkpoints")
    model = build_model(recipe.model, len(classes))
    model.load_state_dict(state)
    export(model, recipe, classes, options.folder / FOLDER)
    print(options.folder / FOLDER)


def _evaluate(options: argparse.Namespace) -> None:
    from pipeline.distributed import process_group
    from pipeline.recipe import load_stored
    from pipeline.results import compare, conclude

    recipe = load_stored(options.folder, options.overrides)
    with process_group() as world:
        conclude(options.folder, recipe, world)
        if world.is_main:
            print(compare([options.folder]))


def _compare(options: argparse.Namespace) -> None:
    from pipeline.results import compare

    print(compare(options.folders))


def _sync(options: argparse.Namespace) -> None:
    from pipeline.tracking import sync

    print(f"{sync(options.folder)} journal lines sent")
