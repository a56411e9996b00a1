"""What a finished run leaves for people: its export, the evaluation of that export, pictures; and runs beside each other."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.data.load import EpochLoader, eval_loader, unit_range
from pipeline.distributed import World, barrier
from pipeline.errors import UserError
from pipeline.evaluate import Evaluation, evaluate
from pipeline.export import find_export, load_export
from pipeline.files import write_atomically
from pipeline.interpret.explain import exact_layers, explainable_layers, layer_contributions
from pipeline.interpret.plots import contribution_sheet, depth_curves
from pipeline.recipe import Recipe, load_stored

EVALUATION = "evaluation.json"
PICTURES = "pictures"
PICTURED_IMAGES = 6
COLUMNS = {  # of the table: metric name -> title
    "val/top1": "top-1",
    "interp/completeness_error": "completeness error",
    "interp/localisation": "localisation: input",
    "interp/localisation_junction": "at junction",
    "interp/depth": "interpretable depth",
    "interp/area": "interpretable area",
}


def conclude(folder: Path, recipe: Recipe, world: World) -> Evaluation:
    """Evaluate the export of the run or export ``folder`` in full; write evaluation.json and pictures into ``folder``.

    Every process must call it.

    Raises:
        UserError: no export, or no prepared data.
    """
    model = load_export(find_export(folder)).to(world.device)
    loader = eval_loader(recipe, world, recipe.evaluation.batch_size)
    result = evaluate(model, recipe, loader, world, recipe.evaluation.final_metrics)
    if world.is_main:
        curve = [dataclasses.asdict(point) for point in result.curve]
        content = {"name": recipe.name, "model": recipe.model.name, "values": result.values, "curve": curve}
        write_atomically(folder / EVALUATION, json.dumps(content, indent=1).encode())
        _draw(model, recipe, world, loader, result, folder / PICTURES)
    barrier()
    return result


def pictures(folder: Path) -> list[Path]:
    """The pictures that ``conclude`` or ``compare`` left in ``folder``."""
    return sorted((folder / PICTURES).glob("*.png"))


def _draw(model: nn.Module, recipe: Recipe, world: World, loader: EpochLoader, result: Evaluation, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    samples = torch.linspace(0, loader.samples - 1, PICTURED_IMAGES).long().unique()
    with loader.select(samples.numpy()) as batches:
        images = unit_range(torch.cat([batch.images for batch in batches]), world.device)
    with torch.no_grad():
        probabilities, targets = model(images).sigmoid().max(1)
    layers = explainable_layers(model, images[:1])
    junction = exact_layers(model, layers)[-1]
    by_layer = layer_contributions(model, images, targets[:, None], [None, junction.name])
    encoded = by_layer[None][:, 0]  # (B, 3 or 6, H, W)
    columns = {"colours of the input": encoded} if encoded.shape[1] == 6 else {}
    columns |= {"at the input": encoded.sum(1), f"at {junction.name or 'input'}": by_layer[junction.name][:, 0].sum(1)}
    names = [f"{loader.classes[c]}: p = {p:.2f}" for c, p in zip(targets.tolist(), probabilities.tolist(), strict=True)]
    maps = [column.cpu() for column in columns.values()]
    contribution_sheet(images.cpu(), maps, list(columns), folder / "contributions.png", row_titles=names)
    if result.curve:
        points = [(point.distance, point.localisation) for point in result.curve]
        depth_curves({recipe.name: points}, 1 / recipe.evaluation.grid_size**2, folder / "depth_curve.png")


def compare(folders: Sequence[Path]) -> str:
    """The evaluations of several runs as a table, with their depth curves in one picture; returns the text to show.

    Raises:
        UserError: a folder was not evaluated.
    """
    recipes, contents = [load_stored(folder) for folder in folders], [_read(folder) for folder in folders]
    titles = ["run", *COLUMNS.values()]
    rows = [[content["name"], *(_cell(name, content["values"]) for name in COLUMNS)] for content in contents]
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [titles, *rows]]
    curves = {content["name"]: [(p["distance"], p["localisation"]) for p in content["curve"]] for content in contents if content["curve"]}
    n = recipes[0].evaluation.grid_size
    lines += ["", f"Localisation: mean share in the right cell of {n}x{n} grids, chance {1 / n**2:.3f}."]
    drawn = [picture for folder in folders for picture in pictures(folder)]
    if curves:
        path = folders[0].parent / "depth_curves.png"
        depth_curves(curves, 1 / n**2, path)
        drawn.append(path)
    lines += ["", "Pictures:", *(f"  {path}" for path in drawn)]
    uris = dict.fromkeys(recipe.tracking_uri for recipe in recipes)
    mlflow = Path(sys.executable).with_name("mlflow")
    lines += ["", "Open the runs in the MLflow UI with", *(f"  {mlflow} ui --backend-store-uri {uri}" for uri in uris)]
    return "\n".join(lines)


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / EVALUATION).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: has no readable {EVALUATION}; `coda evaluate {folder}` makes it") from error


def _cell(name: str, values: dict[str, float]) -> str:
    if name not in values:
        return "-"
    return f"{values[name]:.1e}" if name == "interp/completeness_error" else f"{values[name]:.4f}"
