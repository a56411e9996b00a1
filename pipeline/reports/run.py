"""What a finished run leaves for people: its export, the evaluation of that export, tables and
pictures.
"""

import csv
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.data.epoch_loader import EpochLoader, unit_range
from pipeline.data.loaders import eval_loader
from pipeline.distributed import World, barrier, gather_across_ranks
from pipeline.errors import UserError
from pipeline.evaluation.cache import ResultStore, Row, identify
from pipeline.evaluation.evaluate import Evaluation, evaluate, tasks
from pipeline.export import find_export, load_export
from pipeline.files import write_atomically
from pipeline.interpret.contributions import (
    exact_layers,
    explainable_layers,
    explanation_mode,
    layer_contributions,
)
from pipeline.interpret.methods import (
    METHODS,
    at_input_size,
    attribution_maps,
    check_method,
    own_place,
)
from pipeline.recipe.schema import Recipe
from pipeline.reports.figures import (
    alignment_figure,
    depth_figure,
    localisation_figure,
    removal_figure,
)
from pipeline.reports.plots import contribution_sheet
from pipeline.tracking import Tracker

EVALUATION = "evaluation.json"
TABLES, PICTURES, STORE = "tables", "pictures", "results"
# of the pictures: contribution maps of a few images
SHEET = "contributions.png"
PICTURED_IMAGES = 6


def conclude(folder: Path, recipe: Recipe, world: World) -> Evaluation:
    """Evaluate the export of the run or export ``folder`` in full; write evaluation.json, tables
    and pictures into ``folder``.

    What was evaluated before with the same weights, images and settings is taken from
    ``folder``/results and not computed again; evaluation.json holds all of that, whatever is asked
    for now. Every process must call it.

    Raises:
        UserError: no export, no prepared data, or a method that does not apply to the model.
    """
    evaluation, exported = recipe.evaluation, find_export(folder)
    model = load_export(exported).to(world.device)
    for method in evaluation.methods:
        check_method(model, method)
    loader = eval_loader(recipe, world, evaluation.batch_size)
    identity = gather_across_ranks(identify(exported, recipe.data) if world.is_main else None)[0]
    store = ResultStore(folder / STORE, identity)
    result = evaluate(
        model, recipe, loader, world, evaluation.final_metrics, evaluation.methods, store
    )
    if world.is_main:
        result = _with_known(result, store, tasks(evaluation.final_metrics, evaluation.methods))
        shown = {
            "name": recipe.name,
            "model": recipe.model.name,
            **identity,
            "grid_size": evaluation.grid_size,
        }
        content = {**shown, "values": result.values, "tables": result.tables}
        encoded = json.dumps(content, indent=1).encode()
        if not (
            pictures(folder)
            and (folder / EVALUATION).is_file()
            and (folder / EVALUATION).read_bytes() == encoded
        ):
            _write_tables(recipe.name, result, folder / TABLES)
            _draw(model, recipe, world, loader, result, folder / PICTURES)
            write_atomically(folder / EVALUATION, encoded)
    barrier()
    return gather_across_ranks(result)[0]


def applicable_methods(folder: Path) -> list[str]:
    """The explanation methods that say something about the exported model of the run or export
    ``folder``.
    """
    model, found = load_export(find_export(folder)), []
    for method in METHODS:
        with suppress(UserError):
            check_method(model, method)
            found.append(method)
    return found


def track(tracker: Tracker, recipe: Recipe, folder: Path, result: Evaluation) -> None:
    """Tell the tracker of the run in ``folder`` what ``conclude`` found.

    A metric that an earlier evaluation gave another value, under other settings, keeps it; the new
    one stands beside it as a tag.
    """
    epoch = recipe.training.epochs
    history = tracker.history()
    changed = {
        name: value
        for name, value in result.values.items()
        if history.get((name, epoch), value) != value
    }
    tracker.tags({f"evaluated again/{name}": str(value) for name, value in changed.items()})
    tracker.metrics(result.values, step=epoch)
    for index, point in enumerate(result.curve):
        tracker.metrics({"interp/localisation_by_layer": point.localisation}, step=index)
    for index, row in enumerate(result.tables.get("alignment", [])):
        tracker.metrics({"interp/alignment_by_layer": float(row["median"])}, step=index)
    tracker.artifact(folder / EVALUATION)
    for path in pictures(folder):
        tracker.artifact(path, PICTURES)
    tracker.image(folder / PICTURES / SHEET, Path(SHEET).stem, step=epoch)
    for path in sorted((folder / TABLES).glob("*.csv")):
        tracker.artifact(path, TABLES)


def pictures(folder: Path) -> list[Path]:
    """The pictures that ``conclude`` left in ``folder``."""
    return sorted((folder / PICTURES).glob("*.png"))


def _with_known(
    result: Evaluation, store: ResultStore, asked: Sequence[tuple[str, str]]
) -> Evaluation:
    """``result`` joined with what else the store knows of the same weights and images."""
    joined = Evaluation()
    for (metric, method), known in store.known().items():
        if (metric, method) not in asked:
            joined.add(metric, known)
    joined.values |= result.values
    for metric, rows in result.tables.items():
        joined.tables[metric] = rows + joined.tables.get(metric, [])
    return joined


def _write_tables(name: str, result: Evaluation, folder: Path) -> None:
    """One CSV file for each metric's rows, and one for all values."""
    values: list[Row] = [
        {"run": name, "metric": metric, "value": value} for metric, value in result.values.items()
    ]
    for metric, rows in {"values": values, **result.tables}.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(folder / f"{metric}.csv", text.getvalue().encode())


def draw_contributions(model: nn.Module, world: World, loader: EpochLoader, path: Path) -> None:
    """A sheet of the same few validation images at any time: contributions to their strongest
    class, at the input and the junction.
    """
    images, targets, titles = _pictured(model, world, loader)
    junction = exact_layers(model, explainable_layers(model, images[:1]))[-1].name
    found = layer_contributions(model, images, targets[:, None], [None, junction])
    encoded = found[None][:, 0]  # (B, 3 or 6, H, W)
    columns = {"colours of the input": encoded} if encoded.shape[1] == 6 else {}
    columns["at the input"] = encoded.sum(1)
    if junction is not None:
        columns[f"at {junction}"] = found[junction][:, 0].sum(1)
    maps = [column.cpu() for column in columns.values()]
    contribution_sheet(images.cpu(), maps, list(columns), path, row_titles=titles)


def _pictured(
    model: nn.Module, world: World, loader: EpochLoader
) -> tuple[Tensor, Tensor, list[str]]:
    """The pictured images (B, 3, H, W), their strongest classes (B,), and a title for each."""
    samples = torch.linspace(0, loader.samples - 1, PICTURED_IMAGES).long().unique()
    with loader.select(samples.numpy()) as batches:
        images = unit_range(torch.cat([batch.images for batch in batches]), world.device)
    with torch.no_grad(), explanation_mode(model):
        probabilities, targets = model(images).sigmoid().max(1)
    titles = [
        f"{loader.classes[c]}: p = {p:.2f}"
        for c, p in zip(targets.tolist(), probabilities.tolist(), strict=True)
    ]
    return images, targets, titles


def _draw(
    model: nn.Module,
    recipe: Recipe,
    world: World,
    loader: EpochLoader,
    result: Evaluation,
    folder: Path,
) -> None:
    draw_contributions(model, world, loader, folder / SHEET)
    if len(recipe.evaluation.methods) > 1:
        images, targets, names = _pictured(model, world, loader)
        layers = explainable_layers(model, images[:1])
        maps = []
        for method in recipe.evaluation.methods:
            place = own_place(method, layers).name
            found = attribution_maps(method, model, images, targets[:, None], [place])[place]
            maps.append(at_input_size(found, *images.shape[2:])[:, 0].cpu())
        titles = [method.replace("_", " ") for method in recipe.evaluation.methods]
        contribution_sheet(images.cpu(), maps, titles, folder / "methods.png", row_titles=names)
    draw_tables(result, recipe.evaluation.grid_size, folder)


def draw_tables(result: Evaluation, grid_size: int, folder: Path) -> None:
    """One figure for each table that has one."""
    chance = 1 / grid_size**2
    tables = result.tables
    if rows := tables.get("depth"):
        depth_figure(rows, chance, folder / "depth_curve.png")
    if rows := tables.get("localisation"):
        localisation_figure(rows, chance, folder / "localisation.png")
    if rows := tables.get("localisation_2x2"):
        localisation_figure(rows, 1 / 4, folder / "localisation_2x2.png")
    if rows := tables.get("pixel_removal"):
        removal_figure(rows, folder / "pixel_removal.png")
    if rows := tables.get("alignment"):
        alignment_figure(rows, folder / "alignment.png")
