"""Small files of data sets, and what the tests of sources do with them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.sources import open_source
from pipeline.data.sources.split import Split
from pipeline.errors import UserError
from pipeline.recipe.schema import Recipe


def picture(shade: int, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> bytes:
    """Return a PNG of one shade of red."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def shade(split: Split, index: int) -> int:
    """Return the shade of a ``picture`` in a split."""
    return int(np.asarray(split.read(index))[0, 0, 0])


def write(root: Path, files: dict[str, bytes | str]) -> None:
    """Write files, by their names below ``root``."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def refused(recipe: Recipe, *words: str) -> None:
    """Check that the recipe's source is refused in one line that has all ``words``."""
    with pytest.raises(UserError) as error:
        open_source(recipe.data)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def pack(folder: Path, tar: Path, *extra: tarfile.TarInfo) -> Path:
    """Tar a folder as ``tar -C folder -cf tar .`` does, then add ``extra`` headers."""
    with tarfile.open(tar, "w") as archive:
        archive.add(folder, ".")
        for member in extra:
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return tar


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """Return the header of a tar member."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info
