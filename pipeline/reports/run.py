"""The report of a run: the evaluation of its export, its tables and pictures, and its log.

It is made from the export alone, at the end of a run and whenever `coda evaluate` asks for more.
"""

import csv
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.epoch_loader import EpochLoader, unit_range
from pipeline.data.loaders import eval_loader
from pipeline.data.prepared import PreparedData
from pipeline.distributed import World, barrier, gather_across_ranks
from pipeline.errors import UserError
from pipeline.evaluation.cache import ResultCache, identify
from pipeline.evaluation.evaluate import Evaluation, evaluate, tasks
from pipeline.evaluation.metric import Row
from pipeline.evaluation.metrics import METRICS
from pipeline.export import load_export
from pipeline.files import write_atomically
from pipeline.interpret.contributions import explainable_layers, explanation_mode
from pipeline.interpret.methods import (
    METHODS,
    at_input_size,
    attribution_maps,
    check_method,
    own_place,
)
from pipeline.recipe.schema import Recipe
from pipeline.reports.sheets import contribution_sheet, write_contributions
from pipeline.run_folder import RunFolder
from pipeline.tracking import Tracker

PICTURED_IMAGES = 6
"""Validation images on a sheet."""


def write_report(
    folder: RunFolder, recipe: Recipe, prepared: PreparedData, world: World
) -> Evaluation:
    """Evaluate the export of a run in full; write evaluation.json, tables and pictures.

    Results that the run already holds for the same weights, images and settings are not computed
    again. evaluation.json holds all known results, whatever is asked for now. Every process must
    call this, and each gets the evaluation.

    Args:
        folder: a run, or an export.
        recipe: metrics, methods and their settings.
        prepared: the data.
        world: this process among all.

    Raises:
        UserError: there is no export, or a method does not apply to the model.
    """
    settings, exported = recipe.evaluation, folder.find_export()
    model = load_export(exported).to(world.device)
    for method in settings.methods:
        check_method(model, method)
    loader = eval_loader(recipe, prepared, world, settings.batch_size)
    identity = gather_across_ranks(identify(exported, prepared) if world.is_main else None)[0]
    cache = ResultCache(folder.results, identity)
    evaluation = evaluate(
        model, recipe, loader, world, settings.final_metrics, settings.methods, cache
    )
    if world.is_main:
        asked = tasks(settings.final_metrics, settings.methods)
        evaluation = _with_known(evaluation, cache, asked)
        description = {"name": recipe.name, "model": recipe.model.name, **identity}
        description["grid_size"] = settings.grid_size
        content = {**description, "values": evaluation.values, "tables": evaluation.tables}
        encoded = json.dumps(content, indent=1).encode()
        if not (folder.all_pictures() and _holds(folder, encoded)):
            _write_tables(recipe.name, evaluation, folder)
            _draw_pictures(model, recipe, world, loader, evaluation, folder)
            write_atomically(folder.evaluation, encoded)
    barrier()
    of_main: Evaluation = gather_across_ranks(evaluation)[0]
    return of_main


def applicable_methods(folder: RunFolder) -> list[str]:
    """Find the explanation methods that apply to the exported model of a run."""
    model = load_export(folder.find_export())
    found = []
    for method in METHODS:
        with suppress(UserError):
            check_method(model, method)
            found.append(method)
    return found


def track(tracker: Tracker, recipe: Recipe, folder: RunFolder, evaluation: Evaluation) -> None:
    """Log the results of ``write_report``, and the files that it wrote.

    A metric that has another value from an earlier evaluation, with other settings, keeps that
    value; the new one is logged as a tag.
    """
    epoch = recipe.training.epochs
    history = tracker.history()
    for name, value in evaluation.values.items():
        if history.get((name, epoch), value) != value:
            tracker.tags({f"evaluated again/{name}": str(value)})
    tracker.metrics(evaluation.values, step=epoch)
    for metric in evaluation.tables:
        for name, (_, column) in METRICS[metric].by_layer.items():
            for index, row in enumerate(evaluation.own_rows(metric)):
                tracker.metrics({name: float(row[column])}, step=index)
    tracker.artifact(folder.evaluation)
    for path in folder.all_pictures():
        tracker.artifact(path, folder.pictures.name)
    tracker.image(folder.sheet, folder.sheet.stem, step=epoch)
    for path in sorted(folder.tables.glob("*.csv")):
        tracker.artifact(path, folder.tables.name)


def draw_contributions(model: nn.Module, world: World, loader: EpochLoader, path: Path) -> None:
    """Write a sheet of a few validation images, always the same, with their contributions.

    Contributions are to each image's strongest class, at the input and at the junction.
    """
    images, targets, titles = _pictured(model, world, loader)
    layers = explainable_layers(model, images[:1])
    write_contributions(model, layers, images, targets, titles, path)


def _holds(folder: RunFolder, encoded: bytes) -> bool:
    """Whether evaluation.json already has this content."""
    return folder.evaluation.is_file() and folder.evaluation.read_bytes() == encoded


def _with_known(
    evaluation: Evaluation, cache: ResultCache, asked: Sequence[tuple[str, str]]
) -> Evaluation:
    """``evaluation`` joined with all other known results of the same weights and images."""
    joined = Evaluation()
    for (metric, method), known in cache.known().items():
        # A result of another version may be of a metric that this one lacks.
        if metric in METRICS and (metric, method) not in asked:
            joined.add(metric, known)
    joined.values |= evaluation.values
    for metric, rows in evaluation.tables.items():
        joined.tables[metric] = rows + joined.tables.get(metric, [])
    return joined


def _write_tables(name: str, evaluation: Evaluation, folder: RunFolder) -> None:
    """Write one CSV file for each metric's rows, and one for all values."""
    values: list[Row] = [
        {"run": name, "metric": metric, "value": value}
        for metric, value in evaluation.values.items()
    ]
    for metric, rows in {"values": values, **evaluation.tables}.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(folder.tables / f"{metric}.csv", text.getvalue().encode())


def _draw_pictures(
    model: nn.Module,
    recipe: Recipe,
    world: World,
    loader: EpochLoader,
    evaluation: Evaluation,
    folder: RunFolder,
) -> None:
    draw_contributions(model, world, loader, folder.sheet)
    if len(recipe.evaluation.methods) > 1:
        _draw_methods(model, recipe.evaluation.methods, world, loader, folder)
    for name, rows in evaluation.tables.items():
        metric = METRICS[name]
        if metric.figure:
            path = folder.pictures / f"{metric.picture or name}.png"
            metric.figure(rows, recipe.evaluation, path)


def _draw_methods(
    model: nn.Module, methods: Sequence[str], world: World, loader: EpochLoader, folder: RunFolder
) -> None:
    """Write a sheet of the same images with the maps of every method."""
    images, targets, names = _pictured(model, world, loader)
    layers = explainable_layers(model, images[:1])
    maps = []
    for method in methods:
        place = own_place(method, layers).name
        found = attribution_maps(method, model, images, targets[:, None], [place])[place]
        maps.append(at_input_size(found, *images.shape[2:])[:, 0].cpu())
    titles = [method.replace("_", " ") for method in methods]
    path = folder.pictures / "methods.png"
    contribution_sheet(images.cpu(), maps, titles, path, row_titles=names)


def _pictured(
    model: nn.Module, world: World, loader: EpochLoader
) -> tuple[Tensor, Tensor, list[str]]:
    """Pictured images (B, 3, H, W), their strongest classes (B,), and a title for each."""
    evenly = torch.linspace(0, loader.samples - 1, PICTURED_IMAGES).long()
    samples = np.unique(evenly.numpy())
    with loader.select(samples) as batches:
        images = unit_range(torch.cat([batch.images for batch in batches]), world.device)
    with torch.no_grad(), explanation_mode(model):
        probabilities, targets = model(images).sigmoid().max(1)
    titles = [
        f"{loader.classes[target]}: p = {probability:.2f}"
        for target, probability in zip(targets.tolist(), probabilities.tolist(), strict=True)
    ]
    return images, targets, titles
