"""Images and videos of a user: finding, reading and decoding them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.images import BrokenImage, decode, read_file
from pipeline.errors import UserError

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
"""Endings of the names of videos."""

FRAMES = 24
"""Frames of a video that are explained, evenly spaced."""


def video_frames(source: Path) -> Iterator[tuple[float, Image.Image]]:
    """Yield up to FRAMES evenly spaced frames of a video, with their times in seconds.

    Raises:
        UserError: the file cannot be read as a video.
    """
    import cv2

    video = cv2.VideoCapture(str(source))
    try:
        count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        rate = video.get(cv2.CAP_PROP_FPS) or 25.0
        wanted = {round(place) for place in np.linspace(0, max(count - 1, 0), FRAMES)}
        found = 0
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


def image_names(source: Path) -> list[str]:
    """Names of the images in the folder ``source``, sorted, or of the file ``source`` alone.

    Raises:
        UserError: the folder holds no images.
    """
    if source.is_file():
        return [source.name]
    known = Image.registered_extensions()
    names = sorted(
        path.name for path in source.iterdir() if path.is_file() and path.suffix.lower() in known
    )
    if not names:
        raise UserError(
            f"{source}: holds no images; valid endings are those that Pillow reads, such as .jpg "
            "and .png"
        )
    return names


def read_image(path: Path) -> Image.Image:
    """Read and decode an image, as RGB.

    Raises:
        UserError: the file cannot be read as an image.
    """
    try:
        return decode(read_file(path))
    except (BrokenImage, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason})") from error
