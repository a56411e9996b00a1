"""Explanations of a user's own images or video, as pictures and one self-contained HTML page."""

import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.data.images import CENTRE_SHARE, BrokenImage, decode, read_file
from pipeline.errors import UserError
from pipeline.export import class_names, load_export
from pipeline.interpret.contributions import (
    Layer,
    explainable_layers,
    layer_contributions,
)
from pipeline.recipe.load import load_stored
from pipeline.reports.page import Section, write_page
from pipeline.reports.sheets import contribution_sheet, overlay, write_contributions
from pipeline.run_folder import RunFolder

log = logging.getLogger(__name__)

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
# of a video, evenly spaced
FRAMES = 24
# of these, the ones shown with all their maps
FRAME_SHEETS = 4
# of the animation
FRAME_MILLISECONDS, FRAME_SIDE = 250, 256
PAGE = "index.html"
NOTES = (
    "Red speaks for the class, blue against it; each map is on its own scale. In the colours of the input, a pixel shows the colour with "
    "which it speaks for the class.",
    "Contributions of a CoDA part, from the output back to the junction, add up to the logit exactly; in a conventional part, which "
    "includes the input of a hybrid, they are input times gradient and only an indication.",
)


class Explainer:
    """An exported model with its class names, and what was chosen to be shown of it."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        top_k: int = 3,
        wanted: str | None = None,
        all_layers: bool = False,
    ):
        export = folder.find_export()
        self.model: nn.Module = load_export(export)
        self.classes, self.size = class_names(export), load_stored(export).data.evaluated_size
        if not 1 <= top_k <= len(self.classes):
            raise UserError(
                f"--top-k is {top_k}; {export} has {len(self.classes)} classes, so it must be between 1 and that"
            )
        self.top_k, self.all_layers = top_k, all_layers
        self.wanted = None if wanted is None else _class_index(wanted, self.classes)
        self.layers: list[Layer] = explainable_layers(
            self.model, torch.zeros(1, 3, self.size, self.size)
        )

    def view(self, image: Image.Image) -> Tensor:
        """(3, S, S) in [0, 1], what the model sees: the central square, less the margin that
        evaluation cuts off larger images.
        """
        side = min(image.size)
        if side > self.size:
            side = round(side * CENTRE_SHARE)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        if side != self.size:
            square = square.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255

    def choose(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (B, classes) and the classes to explain in each image (B, K)."""
        with torch.no_grad():
            probabilities = self.model(images).sigmoid()
        if self.wanted is not None:
            return probabilities, torch.full((len(images), 1), self.wanted)
        return probabilities, probabilities.topk(self.top_k).indices

    def explain(self, image: Tensor, title: str, stem: Path) -> Section:
        """Write the sheets ``<stem>.png`` and, if chosen, ``<stem>-layers.png`` of an image (3, S,
        S).
        """
        probabilities, targets = self.choose(image[None])
        names = [f"{self.classes[c]}: p = {probabilities[0, c]:.2f}" for c in targets[0].tolist()]
        rows = image.expand(len(names), *image.shape)
        path = stem.with_suffix(".png")
        junction = write_contributions(
            self.model, self.layers, rows, targets[0], names, path, overlays=True
        )
        at_junction = f" and at {junction}, the junction." if junction else "."
        sheets = [("Contributions at the input" + at_junction, path)]
        if self.all_layers:
            path = stem.with_name(f"{stem.name}-layers.png")
            layers = [layer.name for layer in reversed(self.layers)]
            maps = layer_contributions(self.model, image[None], targets, layers, sum_channels=True)
            titles = [layer or "input" for layer in layers]
            contribution_sheet(
                rows, [maps[layer][0] for layer in layers], titles, path, row_titles=names
            )
            sheets.append(("Contributions of every layer, from the input to the output.", path))
        classes = [(self.classes[c], probabilities[0, c].item()) for c in targets[0].tolist()]
        return Section(title, classes, sheets)

    def animate(self, frames: Sequence[Tensor], path: Path) -> str:
        """Write a GIF: frame, and beside it the contributions at the input to one class over the
        frame; returns that class's name.
        """
        probabilities = torch.cat([self.choose(frame[None])[0] for frame in frames])
        chosen = int(probabilities.mean(0).argmax()) if self.wanted is None else self.wanted
        pictures = []
        for frame in tqdm(frames, desc="frames", leave=False):
            target = torch.tensor([[chosen]])
            maps = layer_contributions(self.model, frame[None], target, [None], sum_channels=True)[
                None
            ][0, 0]
            pair = torch.cat([frame, overlay(frame, maps)], dim=2).permute(1, 2, 0)  # (S, 2 S, 3)
            factor = max(1, FRAME_SIDE // self.size)
            large = pair.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
            pictures.append(Image.fromarray((large * 255).round().byte().numpy()))
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures[0].save(
            path, save_all=True, append_images=pictures[1:], duration=FRAME_MILLISECONDS, loop=0
        )
        return self.classes[chosen]


def explain(
    folder: RunFolder,
    source: Path,
    output: Path,
    *,
    top_k: int = 3,
    wanted: str | None = None,
    all_layers: bool = False,
) -> Path:
    """Explain an image, every image of a folder, or a video with the export of a run; returns the
    page, ``output``/index.html.

    Images of a folder that cannot be read are left out, said on stderr and listed on the page.

    Raises:
        UserError: no export, no such class, or nothing that can be read at ``source``.
    """
    if not source.exists():
        raise UserError(f"{source}: there is no such image, folder or video")
    explainer = Explainer(folder, top_k=top_k, wanted=wanted, all_layers=all_layers)
    sections, skipped = [], []
    if source.suffix.lower() in VIDEOS and source.is_file():
        sections = _explain_video(explainer, source, output)
    else:
        names = _image_names(source)
        root = source if source.is_dir() else source.parent
        for number, name in enumerate(
            tqdm(names, desc="explain", disable=len(names) == 1, leave=False)
        ):
            try:
                image = _read(root, name)
            except UserError as error:
                skipped.append(str(error))
                continue
            sections.append(
                explainer.explain(
                    explainer.view(image), name, output / f"{number:04d}-{_plain(name)}"
                )
            )
    if not sections:
        raise UserError(
            skipped[0]
            if len(skipped) == 1
            else f"{source}: none of its {len(skipped)} images can be read; {skipped[0]}"
        )
    for line in skipped:
        log.warning("left out: %s", line)
    write_page(output / PAGE, f"{folder.name} explains {source.name}", NOTES, sections, skipped)
    return output / PAGE


def _explain_video(explainer: Explainer, source: Path, output: Path) -> list[Section]:
    frames = [(seconds, explainer.view(image)) for seconds, image in _frames(source)]
    path = output / "video.gif"
    shown = explainer.animate([frame for _, frame in frames], path)
    moving = Section(
        source.name,
        (),
        [(f"{len(frames)} frames, and over each its contributions at the input to {shown}.", path)],
    )
    chosen = sorted({round(place) for place in np.linspace(0, len(frames) - 1, FRAME_SHEETS)})
    stills = [
        (f"{source.name} at {frames[i][0]:.2f} s", frames[i][1], output / f"frame-{i:02d}")
        for i in chosen
    ]
    return [moving, *(explainer.explain(frame, title, stem) for title, frame, stem in stills)]


def _frames(source: Path) -> Iterator[tuple[float, Image.Image]]:
    """Up to FRAMES evenly spaced frames with their times in seconds."""
    import cv2

    video = cv2.VideoCapture(str(source))
    try:
        count, rate = int(video.get(cv2.CAP_PROP_FRAME_COUNT)), video.get(cv2.CAP_PROP_FPS) or 25.0
        wanted, found = {round(place) for place in np.linspace(0, max(count - 1, 0), FRAMES)}, 0
        for index in range(count):
            whole, pixels = video.read()
            if not whole:
                break
            if index in wanted:
                found += 1
                yield index / rate, Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
    finally:
        video.release()
    if not found:
        raise UserError(f"{source}: cannot be read as a video")


def _image_names(source: Path) -> list[str]:
    if source.is_file():
        return [source.name]
    known = Image.registered_extensions()
    names = sorted(
        path.name for path in source.iterdir() if path.is_file() and path.suffix.lower() in known
    )
    if not names:
        raise UserError(
            f"{source}: holds no images; valid endings are those that Pillow reads, such as .jpg and .png"
        )
    return names


def _read(root: Path, name: str) -> Image.Image:
    try:
        return decode(read_file(root / name))
    except (BrokenImage, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{root / name}: cannot be read as an image ({reason})") from error


def _class_index(wanted: str, classes: Sequence[str]) -> int:
    if wanted in classes:
        return list(classes).index(wanted)
    if wanted.isdigit() and int(wanted) < len(classes):
        return int(wanted)
    close = difflib.get_close_matches(wanted, classes, n=3) or list(classes)[:5]
    raise UserError(
        f"--class {wanted}: the model has no such class; valid: a number below {len(classes)}, or a name such as {', '.join(close)}"
    )


def _plain(name: str) -> str:
    """A file's stem with characters that any file system takes."""
    return re.sub(r"[^\w-]+", "_", Path(name).stem)[:80]
