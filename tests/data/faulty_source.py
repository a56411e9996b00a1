"""A source that kills its reader or takes its time, and what is left of a prepared folder."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.sources import Source
from pipeline.data.sources.split import Split
from pipeline.errors import UserError


@dataclass(frozen=True)
class Faulty(Split):
    """Grey squares."""

    deadly: int = -1
    """Index of the image whose reader is killed."""
    seconds: float = 0.0
    """Time that every read takes."""

    def read(self, index: int) -> Image.Image:
        """Return a square, or be killed."""
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        return Image.new("RGB", (16, 16), (index % 256, 0, 0))

    def describe(self, index: int) -> str:
        """Return the name of a square."""
        return f"square {index}"


def faulty_source(count: int = 100, deadly: int = -1, seconds: float = 0.0) -> Source:
    """Return a source of ``count`` grey squares in each split."""
    labels = np.zeros(count, np.int64)
    splits = {
        name: Faulty(("a",), labels, True, deadly=deadly, seconds=seconds)
        for name in ("train", "val")
    }
    return Source(lambda data: splits)


def one_line(error: "pytest.ExceptionInfo[UserError]") -> str:
    """Check that an error is a user's mistake in one line, and return the line."""
    assert isinstance(error.value, UserError)
    assert "\n" not in str(error.value)
    return str(error.value)


def remains(folder: Path) -> list[str]:
    """Return the names of the files in a prepared folder."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")
