"""FFCV's library as the set-up builds it, against one built with this system's libraries.

    python -m benchmarks.ffcv_library FOLDER|TAR [--images 400]

The results of both are compared byte by byte, and their speeds. Photographs are decoded whole, and
crops of them are resized as a training run does it, by both libraries in turn, in one thread. The
peer needs a compiler, libopencv-dev and libturbojpeg0-dev.
"""

import argparse
import ctypes
import io
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
JPEG_ENDINGS = (".jpg", ".jpeg")
SIZES = [(224, 224), (160, 160), (32, 32), (256, 256)]
CROPS = 6
"""Crops of each photograph; a third are reduced by whole numbers, which has own code in OpenCV."""


class Library:
    """The two functions of a ``_libffcv.so``."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        self._decode = loaded.imdecode
        self._resize = loaded.resize
        self._decode.argtypes = [
            ctypes.c_void_p,
            ctypes.c_uint64,
            *[ctypes.c_uint32] * 2,
            ctypes.c_void_p,
            *[ctypes.c_uint32] * 6,
            *[ctypes.c_bool] * 2,
        ]
        self._resize.argtypes = [ctypes.c_int64] * 11

    def decode(self, jpeg: np.ndarray, width: int, height: int) -> np.ndarray:
        """Decode a JPEG to its pixels (height, width, 3)."""
        image = np.zeros((height, width, 3), np.uint8)
        whole = (height, width, 0, 0, 1, 1, False, False)
        if self._decode(jpeg.ctypes.data, len(jpeg), height, width, image.ctypes.data, *whole):
            raise ValueError("not decoded")
        return image

    def resize(
        self, image: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]
    ) -> np.ndarray:
        """Resize the rows and columns of ``box`` to ``size`` rows and columns."""
        result = np.zeros((*size, 3), np.uint8)
        self._resize(0, image.ctypes.data, *image.shape[:2], *box, result.ctypes.data, *size)
        return result


def photographs(source: Path, count: int) -> Iterator[bytes]:
    """Yield the first ``count`` JPEGs of a folder or a tar."""
    return islice(_folder_jpegs(source) if source.is_dir() else _tar_jpegs(source), count)


def _folder_jpegs(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in JPEG_ENDINGS:
            yield path.read_bytes()


def _tar_jpegs(tar: Path) -> Iterator[bytes]:
    with tarfile.open(tar) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None and member.name.lower().endswith(JPEG_ENDINGS):
                yield file.read()


def system_library(folder: Path) -> Path:
    """Compile FFCV's library against this system's libraries, and return its path."""
    command = [sys.executable, str(ROOT / "install" / "build_ffcv.py"), "--system", str(folder)]
    wheel = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    shutil.unpack_archive(wheel, folder / "content", "zip")
    return folder / "content" / "ffcv" / "_libffcv.so"


def crops(
    width: int, height: int, generator: random.Random
) -> Iterator[tuple[tuple[int, int, int, int], tuple[int, int]]]:
    """Yield random boxes (top, bottom, left, right), and the sizes to which they are resized."""
    for number in range(CROPS):
        rows, columns = generator.randint(24, height), generator.randint(24, width)
        if number % 3 == 0:
            factor = generator.choice((2, 3))
            rows, columns = rows - rows % factor, columns - columns % factor
            size = rows // factor, columns // factor
        else:
            size = generator.choice(SIZES)
        top, left = generator.randint(0, height - rows), generator.randint(0, width - columns)
        yield (top, top + rows, left, left + columns), size


def compare(
    times: dict[str, list[float]], name: str, calls: list[Callable[[], np.ndarray]]
) -> bool:
    """Call both functions, and return whether their results are equal.

    Their order changes from call to call. The ratio of their times, ours / peer's, is appended to
    ``times[name]``.
    """
    order = [0, 1] if len(times[name]) % 2 else [1, 0]
    results, seconds = {}, {}
    for index in order:
        start = time.perf_counter()
        results[index] = calls[index]()
        seconds[index] = time.perf_counter() - start
    times[name].append(seconds[0] / seconds[1])
    return np.array_equal(results[0], results[1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--images", type=int, default=400)
    options = parser.parse_args()
    from ffcv.libffcv import lib

    with tempfile.TemporaryDirectory() as folder:
        libraries = [Library(Path(lib._name)), Library(system_library(Path(folder)))]
        generator = random.Random(0)
        times: dict[str, list[float]] = {"decode": [], "resize": []}
        different = {"decode": 0, "resize": 0}
        for content in photographs(options.source, options.images):
            jpeg = np.frombuffer(content, np.uint8)
            width, height = Image.open(io.BytesIO(content)).size
            image = libraries[0].decode(jpeg, width, height)
            different["decode"] += not compare(
                times, "decode", [partial(it.decode, jpeg, width, height) for it in libraries]
            )
            for box, size in crops(width, height, generator):
                different["resize"] += not compare(
                    times, "resize", [partial(it.resize, image, box, size) for it in libraries]
                )
    print("| | calls | other bytes | time / peer's: median | quartiles |\n|---|---|---|---|---|")
    for name, ratios in times.items():
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"| {name} | {len(ratios)} | {different[name]} | {middle:.2f} "
            f"| {low:.2f} to {high:.2f} |"
        )


if __name__ == "__main__":
    main()
