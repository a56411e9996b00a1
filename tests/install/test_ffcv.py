"""FFCV's library as set-up builds it.

It needs nothing of the system, and its images are, byte for byte, those of the one it replaces.
"""

import ctypes
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PHOTO = Path(__file__).with_name("photo.jpg").read_bytes()
WIDTH, HEIGHT = 122, 94
OF_THE_C_LIBRARY = {
    "linux-vdso.so.1",
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}

# SHA-256, first 16 digits, of what FFCV 1.0.2 made of photo.jpg when it was compiled against
# Debian 12's OpenCV 4.6.0 and libjpeg-turbo 2.1.5, on x86-64.
# (left, top, width, height, scale, crop, flip)
DECODED = {
    (0, 0, 122, 94, 1, False, False): "c8a1fc1b0c4af49d",
    (0, 0, 112, 80, 1, False, True): "30dd393c10bc919b",
    (16, 16, 64, 48, 1, True, False): "728842ae16471509",
    (0, 0, 122, 94, 2, False, False): "833609f24bb0767a",
}
# By halves, by fractions, larger.
# ((first row, behind the last, first column, behind the last), (rows, columns))
RESIZED = {
    ((0, 94, 0, 122), (47, 61)): "af8fa487deaddc23",
    ((3, 80, 5, 119), (32, 32)): "c7a2ea0ca41f5a4d",
    ((10, 30, 10, 40), (64, 64)): "b422e71c0d5122e1",
    ((0, 94, 0, 122), (224, 224)): "ddb7f78b3c960e2f",
    ((1, 91, 2, 92), (30, 30)): "31d1168d41cec25d",
}


@pytest.fixture(scope="module")
def library():
    from ffcv.libffcv import lib

    return Path(lib._name)


def decode(
    path: Path, left=0, top=0, width=WIDTH, height=HEIGHT, scale=1, crop=False, flip=False
) -> np.ndarray:
    imdecode = ctypes.CDLL(str(path)).imdecode
    imdecode.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint64,
        *[ctypes.c_uint32] * 2,
        ctypes.c_void_p,
        *[ctypes.c_uint32] * 6,
        *[ctypes.c_bool] * 2,
    ]
    image = np.zeros((-(-height // scale), -(-width // scale), 3), np.uint8)
    photo = np.frombuffer(PHOTO, np.uint8)
    place = (image.ctypes.data, height, width, left, top, 1, scale, crop, flip)
    assert imdecode(photo.ctypes.data, len(photo), HEIGHT, WIDTH, *place) == 0
    return image


def resize(
    path: Path, image: np.ndarray, box: tuple[int, ...], size: tuple[int, int]
) -> np.ndarray:
    function = ctypes.CDLL(str(path)).resize
    function.argtypes = [ctypes.c_int64] * 11
    result = np.zeros((*size, 3), np.uint8)
    function(0, image.ctypes.data, *image.shape[:2], *box, result.ctypes.data, *size)
    return result


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("call", DECODED)
def test_decodes_to_the_same_bytes_as_before(library, call):
    assert digest(decode(library, *call)) == DECODED[call]


@pytest.mark.parametrize("call", RESIZED)
def test_resizes_to_the_same_bytes_as_before(library, call):
    assert digest(resize(library, decode(library), *call)) == RESIZED[call]


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_resizing_is_the_mean_of_an_area(library, factor):
    image = np.random.default_rng(0).integers(0, 256, (48, 24, 3), dtype=np.uint8)
    mean = image.reshape(48 // factor, factor, 24 // factor, factor, 3).mean((1, 3))
    assert np.abs(resize(library, image, (0, 48, 0, 24), mean.shape[:2]) - mean).max() <= 0.5


def test_needs_nothing_but_the_c_library(library):
    needed = subprocess.getoutput(f"ldd '{library}'")
    if library.name != "_libffcv.so" or "opencv" in needed:
        pytest.skip(
            f"{library} was compiled against this system's libraries, "
            "as on processors for which there is no other way"
        )
    names = {Path(line.split()[0]).name for line in needed.splitlines()}
    assert names
    assert names <= OF_THE_C_LIBRARY
    assert "not found" not in needed


def test_exports_only_ffcvs_functions(library):
    if not shutil.which("nm"):
        pytest.skip("nm is missing: apt-get install binutils")
    symbols = subprocess.getoutput(f"nm -D --defined-only '{library}'")
    exported = {line.split()[-1] for line in symbols.splitlines()}
    # No more, as OpenCV's own module lives in the same process.
    assert exported == {"resize", "my_memcpy", "my_fread", "imdecode"}


@pytest.mark.slow
def test_systems_libraries_serve_where_they_are(tmp_path):
    """The other way, compiled for real: its library finds OpenCV by itself, and agrees."""
    there = ["pkg-config", "--exists", "opencv4", "libturbojpeg"]
    if not shutil.which("c++") or subprocess.call(there):
        pytest.skip(
            "a compiler, or OpenCV and libjpeg-turbo with headers, are missing: "
            "apt-get install g++ libopencv-dev libturbojpeg0-dev"
        )
    command = [sys.executable, ROOT / "install" / "build_ffcv.py", "--system", tmp_path / "wheels"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert done.stdout.strip() == str(wheel)
    shutil.unpack_archive(wheel, tmp_path / "content", "zip")
    library = tmp_path / "content" / "ffcv" / "_libffcv.so"
    assert "not found" not in subprocess.getoutput(f"ldd '{library}'")
    metadata = next(tmp_path.glob("content/*.dist-info/METADATA")).read_text()
    assert "Requires-Dist: opencv-python-headless" in metadata
    assert all(digest(decode(library, *call)) == expected for call, expected in DECODED.items())
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.stdout, again.stderr) == (done.stdout, ""), (
        "a wheel that was there was built again"
    )
