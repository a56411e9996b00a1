"""The command line: ``coda`` or ``python -m pipeline``."""

import argparse
import atexit
import gc
import re
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import pipeline
from pipeline.caches import use_local_caches
from pipeline.errors import UserError, report, tracebacks_wanted
from pipeline.files import AWAY, FAILING, FULL, PATH
from pipeline.log import log_to_stderr
from pipeline.recipe.ready_made import find_recipe, listing

RECIPE = "YAML file, or the name of a ready-made recipe: see `coda recipes`"
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 or, after Ctrl-C, 130.

    A user's mistake, a package that cannot be imported and a disk that is full or failing are one
    line on stderr and 2; with CODA_TRACEBACK=1 the traceback is above that line. Any other error is
    raised.
    """
    # Before it ends, the interpreter would search all that it has loaded for garbage: 3 s of a
    # processor, while Slurm waits.
    atexit.register(gc.freeze)
    with log_to_stderr():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if [
        word
        for word in rest
        if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")
    ]:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # argparse takes no positional arguments behind an option
    if rest:
        options.overrides += rest
    try:
        if options.models:
            # before the libraries that ask for them are imported
            use_local_caches()
            _register_models()
        return options.run(options) or 0
    except UserError as error:
        return _failed("mistake", str(error))
    except ImportError as error:
        # trying again would not heal it
        return _failed("mistake", _import_failure(error, options))
    except OSError as error:
        if (kind := _kind(error)) is None:
            raise
        remedy = "; make room there and start the same command again" if error.errno in FULL else ""
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _failed(kind, " ".join(text.split()) + remedy)
    except KeyboardInterrupt:
        print(
            "coda: interrupted; the same command continues where this one was stopped",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED


def _failed(event: str, text: str) -> int:
    report(event)
    if tracebacks_wanted():
        traceback.print_exc()
    print(f"coda: {text}", file=sys.stderr)
    return EXIT_USER_ERROR


def _kind(error: OSError) -> Literal["disk", "mistake"] | None:
    """What ``error`` is about, if that is understood. Libraries for the network raise OSErrors,
    too.
    """
    if error.errno in FULL | FAILING or (error.errno in AWAY and error.filename):
        return "disk"
    of_path = error.errno in PATH and error.filename
    # ctypes says in words, without a number, which library it cannot load.
    of_library = type(error) is OSError and error.errno is None and re.search(r"\.so\b", str(error))
    return "mistake" if of_path or of_library else None


def _register_models() -> None:
    try:
        pipeline.register_models()
    except (OSError, RuntimeError) as error:
        # torchvision of another torch, a library of CUDA that is missing
        # of the disk that they are on
        if getattr(error, "errno", None):
            raise
        raise ImportError(f"torch, torchvision or timm: {error}") from error


def _import_failure(error: ImportError, options: argparse.Namespace) -> str:
    """What is missing or broken, in one line, with the remedy."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = f"coda-pipeline[{options.extra}]" if options.extra else "coda-pipeline"
        return f"`coda {options.command}` needs {error.name}, which is not installed: pip install '{package}', or make setup in a checkout"
    reason = " ".join(str(error).split())
    name = f"{error.name}: " if error.name and error.name not in reason else ""
    return f"`coda {options.command}` cannot import {name}{reason}; `coda doctor` says what this machine lacks"


def _add_command(commands, name, run, text, extra="", models=True) -> argparse.ArgumentParser:
    """A command that needs the packages of ``extra`` and, if ``models``, the models in timm."""
    sub = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(run=run, command=name, extra=extra, models=models)
    return sub


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coda", description="Train image classifiers that explain themselves."
    )
    command = partial(_add_command, parser.add_subparsers(required=True, metavar="COMMAND"))
    sub = command(
        "doctor", _doctor, "Check this machine, with the remedy beside each failure.", models=False
    )
    sub.add_argument(
        "recipe",
        nargs="?",
        help="also what this recipe needs: its tracking address and its folders",
    )
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    sub.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of the runs (its disk is checked)"
    )
    command(
        "recipes",
        _recipes,
        "List the ready-made recipes, and where they and the job scripts for Slurm are.",
        models=False,
    )
    for name, run, text in (
        ("prepare", _prepare, "Write the .beton files of a recipe's data set."),
        (
            "train",
            _train,
            "Train a recipe, or continue where it was stopped; ends with export, evaluation and pictures.",
        ),
    ):
        sub = command(name, run, text, "train")
        sub.add_argument("recipe", help=RECIPE)
        sub.add_argument(
            "overrides", nargs="*", metavar="key=value", help="such as training.epochs=3"
        )
    sub = command(
        "verify",
        _verify,
        "Decode everything in a prepared folder and compare it with its manifest.",
        "train",
    )
    sub.add_argument(
        "target",
        metavar="FOLDER|RECIPE",
        help="a prepared folder, or the recipe that it was prepared with",
    )
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    sub = command(
        "plan",
        _plan,
        "Say what a recipe needs and costs on a kind of GPU, from published numbers, or on this processor.",
    )
    sub.add_argument("recipe", help=RECIPE)
    sub.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as training.micro_batch_size=64"
    )
    sub.add_argument(
        "--gpu", default="h100", help="h100, a100, ..., or cpu for this machine (default h100)"
    )
    sub.add_argument("--nodes", type=int, default=1)
    sub.add_argument("--gpus-per-node", type=int, default=8)
    sub.add_argument("--images", type=int, help="training images, where the source does not say")
    sub = command(
        "export",
        _export,
        "Write the newest checkpoint of a run as model.safetensors + config.json.",
    )
    sub.add_argument("folder", type=Path, metavar="RUN")
    text = "Evaluate the export of a run: computes what is missing; writes evaluation.json, tables, pictures."
    sub = command("evaluate", _evaluate, text, "train")
    sub.add_argument("folder", type=Path, metavar="RUN|EXPORT")
    sub.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as evaluation.grids=500"
    )
    sub.add_argument(
        "--metrics", metavar="NAME,...|all", help="default: evaluation.final_metrics of the recipe"
    )
    sub.add_argument(
        "--methods",
        metavar="NAME,...|all",
        help="explanations to judge; default: evaluation.methods of the recipe",
    )
    sub = command(
        "explain",
        _explain,
        "Show what in images or a video speaks for and against classes, as one HTML page.",
        "explain",
    )
    sub.add_argument("folder", type=Path, metavar="RUN|EXPORT")
    sub.add_argument("source", type=Path, metavar="IMAGE|FOLDER|VIDEO")
    classes = sub.add_mutually_exclusive_group()
    classes.add_argument(
        "--top-k", type=int, default=3, help="explain the k most probable classes (default 3)"
    )
    classes.add_argument("--class", dest="wanted", metavar="NAME|INDEX", help="explain this class")
    sub.add_argument(
        "--layers", action="store_true", help="show the contributions of every layer, too"
    )
    sub.add_argument(
        "--output",
        type=Path,
        help="folder of the page (default RUN/explanations/<name of the source>)",
    )
    text = "Show evaluated runs beside each other: here, as one page and picture, and in MLflow."
    sub = command("compare", _compare, text, "train")
    sub.add_argument(
        "names",
        nargs="+",
        metavar="RUN|EXPERIMENT",
        help="folder of a run, or name of an experiment or sweep",
    )
    sub.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        help="folder of the runs in which experiments are looked for",
    )
    sub.add_argument(
        "--output", type=Path, help="folder of comparison.html and .png (default: that of the runs)"
    )
    sub.add_argument(
        "--open",
        action="store_true",
        help="open MLflow's charts of these runs, or without a server the page, in a browser",
    )
    sub = command(
        "models",
        _models,
        "Print what the CoDA networks cost, for every junction, as a markdown table.",
    )
    sub.add_argument("names", nargs="*", metavar="MODEL", help="all if none is named")
    sub.add_argument("--time", action="store_true", help="also measure CPU time; takes minutes")
    sub = command(
        "serve",
        _serve,
        "Start MLflow's server: for this machine, or with --host for a team.",
        "server",
    )
    sub.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        help="folder of the runs: its mlflow.db and mlartifacts are shown",
    )
    sub.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; beyond this machine (0.0.0.0) a password is required",
    )
    sub.add_argument("--port", type=int, default=5000)
    sub.add_argument(
        "--backend-store-uri", metavar="URI", help="such as postgresql://USER@HOST/DATABASE"
    )
    sub.add_argument(
        "--artifacts",
        metavar="FOLDER|s3://BUCKET/PATH",
        help="where the artifacts of new experiments go",
    )
    sub.add_argument(
        "--allowed-hosts",
        metavar="NAME,...",
        default="",
        help="further names by which clients reach this server",
    )
    sub.add_argument(
        "--credentials",
        type=Path,
        help="file of mode 600 with name and password (default ~/.mlflow/credentials)",
    )
    sub = command(
        "sync",
        _sync,
        "Send what MLflow has not received of a run, or of all runs in a folder.",
        "train",
    )
    sub.add_argument("folder", type=Path, metavar="RUN|FOLDER")
    sub.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as tracking.uri=http://HOST:PORT"
    )
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from pipeline import doctor

    recipe = options.recipe and str(find_recipe(options.recipe))
    return doctor.main(options.runs, recipe, options.overrides)


def _recipes(options: argparse.Namespace) -> None:
    print(listing())


def _prepare(options: argparse.Namespace) -> None:
    from pipeline.data.prepare import prepare
    from pipeline.recipe.load import load

    print(prepare(load(find_recipe(options.recipe), options.overrides)))


def _verify(options: argparse.Namespace) -> None:
    from pipeline.data.verify import verify
    from pipeline.recipe.load import load

    data = (
        None
        if Path(options.target).is_dir()
        else load(find_recipe(options.target), options.overrides).data
    )
    print(verify(data.folder if data else Path(options.target), data))


def _train(options: argparse.Namespace) -> None:
    from pipeline.distributed import process_group
    from pipeline.recipe.load import load

    recipe = load(find_recipe(options.recipe), options.overrides)
    with process_group() as world:
        # imports deepspeed, which reads what process_group sets
        from pipeline.training.loop import train

        train(recipe, world)
        if world.is_main:
            _show_run(recipe.folder)


def _plan(options: argparse.Namespace) -> None:
    from pipeline.planning.cpu_profile import cpu_profile
    from pipeline.planning.gpus import GPUS
    from pipeline.planning.plan import Cluster, Plan, cpu_report
    from pipeline.recipe.load import load

    recipe = load(find_recipe(options.recipe), options.overrides)
    for name in ("nodes", "gpus_per_node", "images"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} is {number}; it must be at least 1")
    if options.gpu == "cpu":
        print(cpu_report(recipe, cpu_profile(), options.images))
        return
    if options.gpu not in GPUS:
        raise UserError(f"--gpu {options.gpu!r} is not known; valid: {', '.join([*GPUS, 'cpu'])}")
    print(
        Plan(recipe, options.images).report(
            Cluster(options.nodes, options.gpus_per_node, GPUS[options.gpu])
        )
    )


def _export(options: argparse.Namespace) -> None:
    from pipeline.export import FOLDER, export
    from pipeline.models.create import build_model
    from pipeline.recipe.load import load_stored
    from pipeline.training.checkpoint import newest_model

    recipe = load_stored(options.folder)
    state, classes = newest_model(options.folder / "checkpoints")
    model = build_model(recipe.model, len(classes), fresh=False)
    model.load_state_dict(state)
    export(model, recipe, classes, options.folder / FOLDER)
    print(options.folder / FOLDER)


def _evaluate(options: argparse.Namespace) -> None:
    from typing import get_args

    from pipeline.distributed import process_group
    from pipeline.recipe.load import load_stored
    from pipeline.recipe.schema import Metric
    from pipeline.reports.run import applicable_methods, conclude, track
    from pipeline.tracking import tracker_of

    metrics = ",".join(get_args(Metric)) if options.metrics == "all" else options.metrics
    methods = (
        ",".join(applicable_methods(options.folder))
        if options.methods == "all"
        else options.methods
    )
    asked = {"final_metrics": metrics, "methods": methods}
    lists = [f"evaluation.{key}=[{names}]" for key, names in asked.items() if names]
    recipe = load_stored(options.folder, [*options.overrides, *lists])
    with process_group() as world:
        result = conclude(options.folder, recipe, world)
        with tracker_of(recipe, options.folder, world) as tracker:
            track(tracker, recipe, options.folder, result)
        if world.is_main:
            _show_run(options.folder)


def _explain(options: argparse.Namespace) -> None:
    from pipeline.reports.explain import explain

    output = options.output or options.folder / "explanations" / options.source.name
    print(
        explain(
            options.folder,
            options.source,
            output,
            top_k=options.top_k,
            wanted=options.wanted,
            all_layers=options.layers,
        )
    )


def _compare(options: argparse.Namespace) -> None:
    import webbrowser

    from pipeline.reports.compare import closing, find_runs, mlflow_views, report

    runs = find_runs(options.names, options.runs)
    page = report(runs, options.output or runs[0].folder.resolve().parent)
    print(closing(runs, page))
    if options.open:
        served = [address for address, command in mlflow_views(runs) if not command]
        for address in served or [page.resolve().as_uri()]:
            webbrowser.open(address)


def _show_run(folder: Path) -> None:
    from pipeline.reports.compare import closing, find_runs

    print(closing(find_runs([str(folder)], folder.parent)))


def _models(options: argparse.Namespace) -> None:
    import timm

    from pipeline.planning.cost import table

    known = timm.list_models("coda_*")
    for name in options.names:
        if name not in known:
            raise UserError(f"model {name!r} has no cost table; valid: {', '.join(known)}")
    print(table(options.names or known, timed=options.time))


def _serve(options: argparse.Namespace) -> None:
    from pipeline.tracking.server import Server, serve

    names = tuple(name.strip() for name in options.allowed_hosts.split(",") if name.strip())
    where = (options.runs, options.host, options.port)
    serve(Server(*where, options.backend_store_uri, options.artifacts, names, options.credentials))


def _sync(options: argparse.Namespace) -> None:
    from pipeline.tracking import sync

    print(f"{sync(options.folder, options.overrides)} journal lines sent")
