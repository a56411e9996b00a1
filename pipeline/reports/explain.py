"""Explanations of a user's images or video, as pictures and one self-contained HTML page."""

import difflib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.data.images import CENTRE_SHARE
from pipeline.errors import UserError
from pipeline.export import class_names, load_export
from pipeline.interpret.contributions import Layer, explainable_layers, layer_contributions
from pipeline.recipe.load import load_stored
from pipeline.reports.page import Section, write_page
from pipeline.reports.sheets import contribution_sheet, overlay, write_contributions
from pipeline.reports.user_images import VIDEOS, image_names, read_image, video_frames
from pipeline.run_folder import RunFolder

log = logging.getLogger(__name__)

FRAME_SHEETS = 4
"""Frames of a video that are shown with all their maps."""

FRAME_MILLISECONDS = 250
"""Time for which the animation shows a frame."""

FRAME_SIDE = 256
"""Frames of the animation are enlarged by the greatest whole factor within this side, in pixels."""

PAGE_NAME = "index.html"
NOTES = (
    "Red speaks for the class, blue against it; each map is on its own scale. In the colours of "
    "the input, a pixel shows the colour with which it speaks for the class.",
    "Contributions of a CoDA part, from the output back to the junction, add up to the logit "
    "exactly; in a conventional part, which includes the input of a hybrid, they are input times "
    "gradient and only an indication.",
)


class Explainer:
    """An exported model with its class names, and the choice of what is shown.

    Args:
        folder: a run, or an export.
        top_k: number of classes to explain in each image, the most probable ones.
        wanted: name or index of the one class to explain instead.
        all_layers: whether to show the contributions of every layer, too.

    Raises:
        UserError: there is no export, no such class, or ``top_k`` does not fit its classes.
    """

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
        self.classes = class_names(export)
        self.size = load_stored(export).data.evaluated_size
        if not 1 <= top_k <= len(self.classes):
            raise UserError(
                f"--top-k is {top_k}; {export} has {len(self.classes)} classes, so it must be "
                "between 1 and that"
            )
        self.top_k = top_k
        self.all_layers = all_layers
        self.wanted = None if wanted is None else _class_index(wanted, self.classes)
        self.layers: list[Layer] = explainable_layers(
            self.model, torch.zeros(1, 3, self.size, self.size)
        )

    def view(self, image: Image.Image) -> Tensor:
        """Pixels that the model sees, (3, S, S) in [0, 1].

        This is the central square, less the margin that evaluation cuts off larger images.
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
        """Write the sheets of an image (3, S, S).

        These are ``<stem>.png`` and, with ``all_layers``, ``<stem>-layers.png``.
        """
        probabilities, targets = self.choose(image[None])
        classes = [(self.classes[c], probabilities[0, c].item()) for c in targets[0].tolist()]
        names = [f"{name}: p = {probability:.2f}" for name, probability in classes]
        rows = image.expand(len(names), *image.shape)
        path = stem.with_suffix(".png")
        junction = write_contributions(
            self.model, self.layers, rows, targets[0], names, path, overlays=True
        )
        at_junction = f" and at {junction}, the junction." if junction else "."
        sheets = [("Contributions at the input" + at_junction, path)]
        if self.all_layers:
            path = stem.with_name(f"{stem.name}-layers.png")
            self._write_layers(image, targets, names, path)
            sheets.append(("Contributions of every layer, from the input to the output.", path))
        return Section(title, classes, sheets)

    def _write_layers(
        self, image: Tensor, targets: Tensor, names: Sequence[str], path: Path
    ) -> None:
        """Write a sheet with the contributions of every layer of an image (3, S, S).

        Args:
            image: (3, S, S), RGB in [0, 1].
            targets: (1, K) int64, the explained classes.
            names: title of each class.
            path: PNG file.
        """
        layers = [layer.name for layer in reversed(self.layers)]
        found = layer_contributions(self.model, image[None], targets, layers, sum_channels=True)
        maps = [found[layer][0] for layer in layers]
        rows = image.expand(len(names), *image.shape)
        titles = [layer or "input" for layer in layers]
        contribution_sheet(rows, maps, titles, path, row_titles=names)

    def animate(self, frames: Sequence[Tensor], path: Path) -> str:
        """Write a GIF of the frames, each beside its contributions at the input to one class.

        Returns:
            name of that class: the wanted one, or the most probable over all frames.
        """
        probabilities = torch.cat([self.choose(frame[None])[0] for frame in frames])
        chosen = int(probabilities.mean(0).argmax()) if self.wanted is None else self.wanted
        pictures = [
            self._animated(frame, chosen) for frame in tqdm(frames, desc="frames", leave=False)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures[0].save(
            path, save_all=True, append_images=pictures[1:], duration=FRAME_MILLISECONDS, loop=0
        )
        return self.classes[chosen]

    def _animated(self, frame: Tensor, chosen: int) -> Image.Image:
        """Frame (3, S, S) of the animation, enlarged by a whole factor."""
        targets = torch.tensor([[chosen]])
        found = layer_contributions(self.model, frame[None], targets, [None], sum_channels=True)
        over = overlay(frame, found[None][0, 0])
        pair = torch.cat([frame, over], dim=2).permute(1, 2, 0)  # (S, 2 S, 3)
        factor = max(1, FRAME_SIDE // self.size)
        large = pair.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        return Image.fromarray((large * 255).round().byte().numpy())


def explain(
    folder: RunFolder,
    source: Path,
    output: Path,
    *,
    top_k: int = 3,
    wanted: str | None = None,
    all_layers: bool = False,
) -> Path:
    """Explain an image, every image of a folder, or a video with the export of a run.

    Images that cannot be read are left out, logged and listed on the page.

    Args:
        folder: a run, or an export.
        source: the image, folder or video.
        output: folder of the pictures and of the page.
        top_k: see ``Explainer``.
        wanted: see ``Explainer``.
        all_layers: see ``Explainer``.

    Returns:
        path of the page, ``output``/index.html.

    Raises:
        UserError: there is no export, no such class, or nothing that can be read at ``source``.
    """
    if not source.exists():
        raise UserError(f"{source}: there is no such image, folder or video")
    explainer = Explainer(folder, top_k=top_k, wanted=wanted, all_layers=all_layers)
    skipped: list[str] = []
    if source.suffix.lower() in VIDEOS and source.is_file():
        sections = _explain_video(explainer, source, output)
    else:
        sections, skipped = _explain_images(explainer, source, output)
    for line in skipped:
        log.warning("left out: %s", line)
    page = output / PAGE_NAME
    write_page(page, f"{folder.name} explains {source.name}", NOTES, sections, skipped)
    return page


def _explain_images(
    explainer: Explainer, source: Path, output: Path
) -> tuple[list[Section], list[str]]:
    """Sections of the images that can be read, and a line for each of the others."""
    sections: list[Section] = []
    skipped: list[str] = []
    names = image_names(source)
    root = source if source.is_dir() else source.parent
    shown = tqdm(names, desc="explain", disable=len(names) == 1, leave=False)
    for number, name in enumerate(shown):
        try:
            image = read_image(root / name)
        except UserError as error:
            skipped.append(str(error))
            continue
        stem = output / f"{number:04d}-{_plain(name)}"
        sections.append(explainer.explain(explainer.view(image), name, stem))
    if not sections and len(skipped) == 1:
        raise UserError(skipped[0])
    if not sections:
        raise UserError(f"{source}: none of its {len(skipped)} images can be read; {skipped[0]}")
    return sections, skipped


def _explain_video(explainer: Explainer, source: Path, output: Path) -> list[Section]:
    """Section of the animation, and sections of a few of its frames."""
    frames = [(seconds, explainer.view(image)) for seconds, image in video_frames(source)]
    path = output / "video.gif"
    shown = explainer.animate([frame for _, frame in frames], path)
    caption = f"{len(frames)} frames, and over each its contributions at the input to {shown}."
    sections = [Section(source.name, (), [(caption, path)])]
    for index in sorted({round(place) for place in np.linspace(0, len(frames) - 1, FRAME_SHEETS)}):
        seconds, frame = frames[index]
        title = f"{source.name} at {seconds:.2f} s"
        sections.append(explainer.explain(frame, title, output / f"frame-{index:02d}"))
    return sections


def _class_index(wanted: str, classes: Sequence[str]) -> int:
    if wanted in classes:
        return list(classes).index(wanted)
    if wanted.isdigit() and int(wanted) < len(classes):
        return int(wanted)
    close = difflib.get_close_matches(wanted, classes, n=3) or list(classes)[:5]
    raise UserError(
        f"--class {wanted}: the model has no such class; valid: a number below {len(classes)}, "
        f"or a name such as {', '.join(close)}"
    )


def _plain(name: str) -> str:
    """Stem of a file name, in characters that any file system takes."""
    return re.sub(r"[^\w-]+", "_", Path(name).stem)[:80]
