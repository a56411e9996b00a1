"""What the commands do. Each imports what it needs, so that the others need less.

A function takes the parsed arguments, prints the command's result, and returns an exit code or
None.
"""

import argparse

from pipeline.errors import UserError
from pipeline.recipe.ready_made import find_recipe, listing
from pipeline.recipe.schema import Recipe
from pipeline.run_folder import RunFolder


def doctor(options: argparse.Namespace) -> int:
    """Check this machine."""
    from pipeline import doctor

    recipe = options.recipe and str(find_recipe(options.recipe))
    return doctor.main(options.runs, recipe, options.overrides)


def recipes(options: argparse.Namespace) -> None:
    """List the ready-made recipes."""
    print(listing())


def prepare(options: argparse.Namespace) -> None:
    """Prepare a recipe's data set."""
    from pipeline.data.prepare import prepare

    print(prepare(_recipe(options)))


def verify(options: argparse.Namespace) -> None:
    """Verify a prepared folder."""
    from pathlib import Path

    from pipeline.data.verify import verify

    folder = Path(options.target)
    if folder.is_dir():
        print(verify(folder))
    else:
        options.recipe = options.target
        data = _recipe(options).data
        print(verify(data.folder, data))


def train(options: argparse.Namespace) -> None:
    """Train a recipe."""
    from pipeline.distributed import process_group
    from pipeline.training.run import train

    recipe = _recipe(options)
    with process_group() as world:
        train(recipe, world)
        if world.is_main:
            _show_run(recipe.folder)


def plan(options: argparse.Namespace) -> None:
    """Plan a recipe."""
    from pipeline.planning.cluster import Cluster
    from pipeline.planning.cpu_profile import cpu_profile
    from pipeline.planning.gpus import GPUS
    from pipeline.planning.plan import Plan
    from pipeline.planning.report import cpu_report, gpu_report

    recipe = _recipe(options)
    for name in ("nodes", "gpus_per_node", "images"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} is {number}; it must be at least 1")
    if options.gpu == "cpu":
        print(cpu_report(recipe, cpu_profile(), options.images))
        return
    if options.gpu not in GPUS:
        raise UserError(f"--gpu {options.gpu!r} is not known; valid: {', '.join([*GPUS, 'cpu'])}")
    cluster = Cluster(options.nodes, options.gpus_per_node, GPUS[options.gpu])
    print(gpu_report(Plan(recipe, options.images), cluster))


def export(options: argparse.Namespace) -> None:
    """Export the newest checkpoint of a run."""
    from pipeline.export import export
    from pipeline.models.create import build_model
    from pipeline.recipe.load import load_stored
    from pipeline.training.checkpoint_files import newest_model

    folder = RunFolder(options.folder)
    recipe = load_stored(folder.path)
    state, classes = newest_model(folder.checkpoints)
    model = build_model(recipe.model, len(classes), fresh=False)
    model.load_state_dict(state)
    export(model, recipe, classes, folder.export)
    print(folder.export)


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate the export of a run."""
    from pipeline.data.prepared import open_prepared
    from pipeline.distributed import process_group
    from pipeline.evaluation.metrics import METRICS, tracked_names
    from pipeline.recipe.load import load_stored
    from pipeline.reports.run import applicable_methods, track, write_report
    from pipeline.tracking import tracker_of

    folder = RunFolder(options.folder)
    metrics, methods = options.metrics, options.methods
    if metrics == "all":
        metrics = ",".join(METRICS)
    if methods == "all":
        methods = ",".join(applicable_methods(folder))
    asked = {"final_metrics": metrics, "methods": methods}
    lists = [f"evaluation.{key}=[{names}]" for key, names in asked.items() if names]
    recipe = load_stored(folder.path, [*options.overrides, *lists])
    with process_group() as world:
        evaluation = write_report(folder, recipe, open_prepared(recipe.data), world)
        with tracker_of(recipe, folder, world, names=tracked_names()) as tracker:
            track(tracker, recipe, folder, evaluation)
        if world.is_main:
            _show_run(folder)


def explain(options: argparse.Namespace) -> None:
    """Explain a user's images."""
    from pipeline.reports.explain import explain

    folder = RunFolder(options.folder)
    page = explain(
        folder,
        options.source,
        options.output or folder.explanations / options.source.name,
        top_k=options.top_k,
        wanted=options.wanted,
        all_layers=options.layers,
    )
    print(page)


def compare(options: argparse.Namespace) -> None:
    """Compare runs."""
    import webbrowser

    from pipeline.reports.closing import closing
    from pipeline.reports.compare import mlflow_pages, write_comparison
    from pipeline.reports.compared import find_runs

    runs = find_runs(options.names, options.runs)
    page = write_comparison(runs, options.output or runs[0].folder.path.resolve().parent)
    print(closing(runs, page))
    if options.open:
        served = [address for address, command in mlflow_pages(runs) if not command]
        for address in served or [page.resolve().as_uri()]:
            webbrowser.open(address)


def models(options: argparse.Namespace) -> None:
    """Print what the networks cost."""
    import timm

    from pipeline.planning.cost import table

    known = timm.list_models("coda_*")
    for name in options.names:
        if name not in known:
            raise UserError(f"model {name!r} has no cost table; valid: {', '.join(known)}")
    print(table(options.names or known, timed=options.time))


def serve(options: argparse.Namespace) -> None:
    """Start MLflow's server."""
    from pipeline.tracking.server import Server, serve

    names = tuple(name.strip() for name in options.allowed_hosts.split(",") if name.strip())
    where = (options.runs, options.host, options.port)
    serve(Server(*where, options.backend_store_uri, options.artifacts, names, options.credentials))


def sync(options: argparse.Namespace) -> None:
    """Send what MLflow has not received."""
    from pipeline.tracking import sync

    print(f"{sync(options.folder, options.overrides)} journal lines sent")


def _recipe(options: argparse.Namespace) -> Recipe:
    from pipeline.recipe.load import load

    return load(find_recipe(options.recipe), options.overrides)


def _show_run(folder: RunFolder) -> None:
    from pipeline.reports.closing import closing
    from pipeline.reports.compared import open_run

    print(closing([open_run(folder)]))
