"""The commands and their arguments."""

import argparse
from pathlib import Path
from typing import TypeAlias

from pipeline.cli import commands

Group: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
RECIPE_HELP = "YAML file, or the name of a ready-made recipe: see `coda recipes`"


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of ``coda``.

    What it parses also holds ``run``, the command's function; ``command``, its name; ``extra``, the
    extra of the package that it needs; and ``models``, whether it needs the models in timm.
    """
    parser = argparse.ArgumentParser(
        prog="coda", description="Train image classifiers that explain themselves."
    )
    group = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_doctor,
        _add_recipes,
        _add_prepare,
        _add_train,
        _add_verify,
        _add_plan,
        _add_export,
        _add_evaluate,
        _add_explain,
        _add_compare,
        _add_models,
        _add_serve,
        _add_sync,
    ):
        add(group)
    return parser


class _Command:
    """One command, whose arguments are added in turn."""

    def __init__(
        self,
        group: Group,
        name: str,
        text: str,
        extra: str = "",
        *,
        models: bool = True,
    ) -> None:
        self.parser = group.add_parser(name, help=text, description=text)
        run = getattr(commands, name)
        self.parser.set_defaults(run=run, command=name, extra=extra, models=models)

    def recipe(self, overrides: str) -> None:
        """Take a recipe and overrides, with an example of these."""
        self.parser.add_argument("recipe", help=RECIPE_HELP)
        self.overrides(overrides)

    def overrides(self, text: str) -> None:
        """Take overrides of a recipe."""
        self.parser.add_argument("overrides", nargs="*", metavar="key=value", help=text)

    def runs(self, text: str) -> None:
        """Take the folder of the runs."""
        self.parser.add_argument("--runs", type=Path, default=Path("runs"), help=text)


def _add_doctor(group: Group) -> None:
    command = _Command(
        group, "doctor", "Check this machine, with the remedy beside each failure.", models=False
    )
    text = "also what this recipe needs: its tracking address and its folders"
    command.parser.add_argument("recipe", nargs="?", help=text)
    command.overrides("of the recipe")
    command.runs("folder of the runs (its disk is checked)")


def _add_recipes(group: Group) -> None:
    text = "List the ready-made recipes, and where they and the job scripts for Slurm are."
    _Command(group, "recipes", text, models=False)


def _add_prepare(group: Group) -> None:
    command = _Command(group, "prepare", "Write the .beton files of a recipe's data set.", "train")
    command.recipe("such as data.workers=8")


def _add_train(group: Group) -> None:
    text = (
        "Train a recipe, or continue where it was stopped; ends with export, evaluation and "
        "pictures."
    )
    _Command(group, "train", text, "train").recipe("such as training.epochs=3")


def _add_verify(group: Group) -> None:
    text = "Decode everything in a prepared folder and compare it with its manifest."
    command = _Command(group, "verify", text, "train")
    command.parser.add_argument(
        "target",
        metavar="FOLDER|RECIPE",
        help="a prepared folder, or the recipe that it was prepared with",
    )
    command.overrides("of the recipe")


def _add_plan(group: Group) -> None:
    text = (
        "Say what a recipe needs and costs on a kind of GPU, from published numbers, or on this "
        "processor."
    )
    command = _Command(group, "plan", text)
    command.recipe("such as training.micro_batch_size=64")
    add = command.parser.add_argument
    add("--gpu", default="h100", help="h100, a100, ..., or cpu for this machine (default h100)")
    add("--nodes", type=int, default=1)
    add("--gpus-per-node", type=int, default=8)
    add("--images", type=int, help="training images, where the source does not say")


def _add_export(group: Group) -> None:
    text = "Write the newest checkpoint of a run as model.safetensors + config.json."
    _Command(group, "export", text).parser.add_argument("folder", type=Path, metavar="RUN")


def _add_evaluate(group: Group) -> None:
    text = (
        "Evaluate the export of a run: computes what is missing; writes evaluation.json, tables, "
        "pictures."
    )
    command = _Command(group, "evaluate", text, "train")
    command.parser.add_argument("folder", type=Path, metavar="RUN|EXPORT")
    command.overrides("such as evaluation.grids=500")
    command.parser.add_argument(
        "--metrics", metavar="NAME,...|all", help="default: evaluation.final_metrics of the recipe"
    )
    command.parser.add_argument(
        "--methods",
        metavar="NAME,...|all",
        help="explanations to judge; default: evaluation.methods of the recipe",
    )


def _add_explain(group: Group) -> None:
    text = "Show what in images or a video speaks for and against classes, as one HTML page."
    parser = _Command(group, "explain", text, "explain").parser
    parser.add_argument("folder", type=Path, metavar="RUN|EXPORT")
    parser.add_argument("source", type=Path, metavar="IMAGE|FOLDER|VIDEO")
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument(
        "--top-k", type=int, default=3, help="explain the k most probable classes (default 3)"
    )
    classes.add_argument("--class", dest="wanted", metavar="NAME|INDEX", help="explain this class")
    parser.add_argument(
        "--layers", action="store_true", help="show the contributions of every layer, too"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the page (default RUN/explanations/<name of the source>)",
    )


def _add_compare(group: Group) -> None:
    text = "Show evaluated runs beside each other: here, as one page and picture, and in MLflow."
    command = _Command(group, "compare", text, "train")
    command.parser.add_argument(
        "names",
        nargs="+",
        metavar="RUN|EXPERIMENT",
        help="folder of a run, or name of an experiment or sweep",
    )
    command.runs("folder of the runs in which experiments are looked for")
    command.parser.add_argument(
        "--output", type=Path, help="folder of comparison.html and .png (default: that of the runs)"
    )
    command.parser.add_argument(
        "--open",
        action="store_true",
        help="open MLflow's charts of these runs, or without a server the page, in a browser",
    )


def _add_models(group: Group) -> None:
    text = "Print what the CoDA networks cost, for every junction, as a markdown table."
    parser = _Command(group, "models", text).parser
    parser.add_argument("names", nargs="*", metavar="MODEL", help="all if none is named")
    parser.add_argument("--time", action="store_true", help="also measure CPU time; takes minutes")


def _add_serve(group: Group) -> None:
    text = "Start MLflow's server: for this machine, or with --host for a team."
    command = _Command(group, "serve", text, "server")
    command.runs("folder of the runs: its mlflow.db and mlartifacts are shown")
    add = command.parser.add_argument
    text = "address to listen on; beyond this machine (0.0.0.0) a password is required"
    add("--host", default="127.0.0.1", help=text)
    add("--port", type=int, default=5000)
    add("--backend-store-uri", metavar="URI", help="such as postgresql://USER@HOST/DATABASE")
    text = "where the artifacts of new experiments go"
    add("--artifacts", metavar="FOLDER|s3://BUCKET/PATH", help=text)
    text = "further names by which clients reach this server"
    add("--allowed-hosts", metavar="NAME,...", default="", help=text)
    text = "file of mode 600 with name and password (default ~/.mlflow/credentials)"
    add("--credentials", type=Path, help=text)


def _add_sync(group: Group) -> None:
    text = "Send what MLflow has not received of a run, or of all runs in a folder."
    command = _Command(group, "sync", text, "train")
    command.parser.add_argument("folder", type=Path, metavar="RUN|FOLDER")
    command.overrides("such as tracking.uri=http://HOST:PORT")
