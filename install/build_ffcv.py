"""Build FFCV as a wheel that needs nothing of the system: ``python build_ffcv.py FOLDER``.

FFCV's sources compile against OpenCV and libjpeg-turbo of the system, of which they use one
function and one decoder. Here both are compiled from sources and become part of FFCV's library,
with Zig's C and C++ compiler, for glibc 2.17 and newer and for every Python 3. Sources and tools
come through pip, so that mirrors, proxies and wheelhouses serve as for everything else; no
compiler, header, root or writable home is needed. On other processors than x86-64 and 64-bit ARM,
or with ``--system``, the system's compiler, OpenCV and libjpeg-turbo are used, as pkg-config finds
them, and the library remembers where they are. Prints the path of the wheel.
"""

import argparse
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

from ffcv_parts import COMMON, CORE, IMGPROC, JPEG, NEEDED_FILES, OPENCV, YASM

HERE = Path(__file__).resolve().parent
# Processor -> Zig's target.
TARGETS = {"x86_64": "x86_64-linux-gnu.2.17", "aarch64": "aarch64-linux-gnu.2.17"}
# pkg-config's names.
LIBRARIES = ("opencv4", "libturbojpeg")
MODULES = ("core", "imgproc")
ARCHIVERS = ("ar", "ranlib")


class BuildError(Exception):
    """A step that did not work, in words for the user."""


def main() -> int:
    """Build unless the wheel is there, and print its path."""
    parser = argparse.ArgumentParser(description="Build FFCV as a wheel.")
    parser.add_argument("folder", type=Path, help="where the wheel goes")
    parser.add_argument("--system", action="store_true", help="with the system's libraries")
    options = parser.parse_args()
    machine = platform.machine()
    system = options.system or machine not in TARGETS
    tag = f"py3-none-{'linux' if system else 'manylinux_2_17'}_{machine}"
    options.folder.mkdir(parents=True, exist_ok=True)
    for found in options.folder.glob(f"ffcv-*-{tag}.whl"):
        print(found)
        return 0
    # So that the temporary folder is removed when set-up is interrupted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with tempfile.TemporaryDirectory(prefix="coda-ffcv-") as folder:
            print(Build(Path(folder), system).wheel(tag, options.folder))
    except BuildError as error:
        print(f"build_ffcv: {error}", file=sys.stderr)
        return 2
    return 0


class Build:
    """One build in a temporary folder."""

    def __init__(self, folder: Path, system: bool) -> None:
        self.folder, self.system, self.start = folder, system, time.monotonic()
        self.programs = folder / "tools" / "bin"
        self.python = self.programs / "python"
        self.ffcv = folder / "ffcv"
        self.opencv = folder / "opencv-python-headless" / "opencv"
        self.environment = {
            **os.environ,
            "PATH": f"{self.programs}:{os.environ.get('PATH', os.defpath)}",
            "ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"),
            "ZIG_LOCAL_CACHE_DIR": str(folder / "zig"),
            **dict.fromkeys(("HOME", "TMPDIR"), str(folder)),
        }

    def wheel(self, tag: str, destination: Path) -> Path:
        """Do everything, from the download on; returns the wheel's path in ``destination``."""
        self.download_tools()
        self.download_sources()
        content, out = self.folder / "wheel", self.folder / "out"
        shutil.copytree(self.ffcv / "ffcv", content / "ffcv")
        link = self.link_to_system if self.system else self.link_statically
        link(self.library_source(), content / "ffcv" / "_libffcv.so")
        replace(
            content / "ffcv" / "libffcv.py",
            ("import ffcv._libffcv\n", "from pathlib import Path\n"),
            ("ffcv._libffcv.__file__", 'str(Path(__file__).with_name("_libffcv.so"))'),
        )
        self.describe(content, tag)
        out.mkdir()
        self.run("packing", [self.python, "-m", "wheel", "pack", content, "--dest-dir", out])
        (made,) = out.glob("*.whl")
        part = destination / f".{made.name}.part"
        shutil.copyfile(made, part)
        return part.rename(destination / made.name)

    def download_tools(self) -> None:
        """Install CMake, Ninja and Zig in an environment of their own."""
        venv.create(self.folder / "tools", with_pip=False, symlinks=True)
        wanted = ["wheel", "-c"] if self.system else ["-r"]
        words = ["--python", self.python, "install", *wanted, HERE / "ffcv_tools.txt"]
        self.pip("downloading tools", words)
        if self.system:
            return
        # Only the last link needs the C++ library, which Zig compiles first;
        # CMake links to see how the compiler is called.
        lean = 'case " $* " in *" -c "* | *" -E "*) ;; *) set -- -nostdlib++ "$@" ;; esac\n'
        for name, first in (("cc", lean), ("c++", lean), ("ar", ""), ("ranlib", "")):
            script = self.programs / f"zig-{name}"
            command = shlex.join(map(str, self.zig(name)))
            script.write_text(f'#!/bin/sh\n{first}exec {command} "$@"\n')
            script.chmod(0o755)
        self.environment["CC"] = str(self.programs / "zig-cc")
        self.environment["CXX"] = str(self.programs / "zig-c++")

    def zig(self, name: str) -> list[object]:
        """The words that call one of Zig's programs: cc and c++ for the target, ar, ranlib."""
        words: list[object] = [self.python, "-m", "ziglang", name]
        if name in ("cc", "c++"):
            # yasm states the date on which it was compiled.
            words += ["-target", TARGETS[platform.machine()], "-Wno-error=date-time"]
        return words

    def download_sources(self) -> None:
        """Download, check and unpack the source archives."""
        archives, wanted = self.folder / "archives", self.folder / "sources.txt"
        lines = (HERE / "ffcv_sources.txt").read_text().splitlines(keepends=True)
        chosen = [line for line in lines if not self.system or line.startswith("ffcv")]
        wanted.write_text("".join(chosen))
        words = ["download", "--dest", archives, "--no-deps", "--no-binary", ":all:"]
        words += ["--no-build-isolation", "--require-hashes", "-r", wanted]
        # Old versions of pip would call setup.py; in new ones nothing has the variable's name.
        variables = {"PIP_USE_PEP517": "1", "PYTHONPATH": str(HERE / "metadata_only")}
        self.pip("downloading sources", words, **variables)
        for path in sorted(archives.iterdir()):
            name = path.name.rsplit("-", 1)[0]
            with tarfile.open(path) as archive:
                for member in archive:
                    inside = member.name.partition("/")[2]
                    content = archive.extractfile(member)
                    if content and inside.startswith(tuple(NEEDED_FILES[name])):
                        target = self.folder / name / inside
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(content.read())

    def library_source(self) -> Path:
        """Strip FFCV's C++ file of the empty Python module around it and of most headers."""
        path = self.ffcv / "libffcv" / "libffcv.cpp"
        needed = "#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n"
        replace(path, ("#include <Python.h>\n", ""), ("#include <opencv2/opencv.hpp>\n", needed))
        text = path.read_text()
        path.write_text(text[: text.index("    static PyMethodDef")] + "}\n")
        return path

    def link_statically(self, source: Path, library: Path) -> None:
        """Compile libjpeg-turbo, its assembler and part of OpenCV; link FFCV's library of them."""
        (jpeg_source,) = (self.folder / "simplejpeg" / "lib").glob("libjpeg-turbo-*")
        (yasm_source,) = (self.folder / "simplejpeg" / "lib").glob("yasm-*")
        assembler, baseline = [], []
        if platform.machine() == "x86_64":
            yasm = self.cmake("yasm", yasm_source, ["yasm"], YASM)
            assembler = [f"-DCMAKE_ASM_NASM_COMPILER={yasm / 'yasm'}"]
            baseline = ["-DCPU_BASELINE=SSE4_2"]
        jpeg = self.cmake("libjpeg-turbo", jpeg_source, ["turbojpeg-static"], [*JPEG, *assembler])
        opencv, objects = self.compile_opencv(baseline)
        exports = self.folder / "exports"
        exports.write_text("{ global: resize; my_memcpy; my_fread; imdecode; local: *; };\n")
        modules = [self.opencv / "modules" / name / "include" for name in MODULES]
        words = [*self.zig("c++"), "-O3", "-fPIC", "-shared", "-s", "-Wl,-z,defs"]
        words += ["-Wl,--gc-sections", f"-Wl,--version-script={exports}"]
        words += [f"-I{folder}" for folder in (opencv, jpeg_source, *modules)]
        words += [source, *objects, jpeg / "libturbojpeg.a", "-lpthread", "-ldl", "-o", library]
        self.run("linking", words)

    def compile_opencv(self, settings: list[str]) -> tuple[Path, list[Path]]:
        """Compile the needed files of OpenCV.

        Returns:
            The build folder, in which headers were made, and the objects.
        """
        core, imgproc = (f"modules/{name}/CMakeFiles/opencv_{name}.dir/src" for name in MODULES)
        of_core = [f"{core}/{name}.cpp.o" for name in CORE]
        of_imgproc = [f"{imgproc}/{name}.cpp.o" for name in IMGPROC[platform.machine()]]
        build = self.cmake("opencv", self.opencv, of_core, [*OPENCV, *settings])
        # Ninja would compile all of the core before these files, and make this header, of which
        # only one line is left without OpenCL.
        header = build / "modules" / "imgproc" / "opencl_kernels_imgproc.hpp"
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text('#include "opencv2/core/opencl/ocl_defs.hpp"\n')
        for name in of_imgproc:
            (build / name).parent.mkdir(parents=True, exist_ok=True)
            question = ["ninja", "-C", build, "-t", "commands", name]
            command = self.run("asking for a command", question).splitlines()[-1]
            self.run(f"compiling {Path(name).name}", ["sh", "-c", f"cd '{build}' && {command}"])
        return build, [build / name for name in (*of_core, *of_imgproc)]

    def link_to_system(self, source: Path, library: Path) -> None:
        """Link FFCV's library to those that pkg-config knows; it remembers their folders."""
        words: list[object] = [*shlex.split(os.environ.get("CXX", "c++")), "-O3", "-fPIC"]
        words += ["-shared", *self.pkg_config("--cflags"), source]
        words += self.pkg_config("--libs-only-L")
        words += [f"-Wl,-rpath,{folder}" for folder in self.pkg_config("--variable=libdir")]
        words += ["-lopencv_imgproc", "-lopencv_core", "-lturbojpeg", "-lpthread", "-o", library]
        self.run("linking", words)

    def pkg_config(self, question: str) -> list[str]:
        """Ask pkg-config about both libraries; returns its words, each once."""
        asked = (["pkg-config", question, name] for name in LIBRARIES)
        answers = [self.run("looking for libraries", words) for words in asked]
        return list(dict.fromkeys(shlex.split(" ".join(answers))))

    def describe(self, content: Path, tag: str) -> None:
        """Write FFCV's metadata, with OpenCV's headless build as requirement, and all licences."""
        head, _, text = (self.ffcv / "PKG-INFO").read_text(encoding="utf-8").partition("\n\n")
        version = next(line.split()[1] for line in head.splitlines() if line.startswith("Version:"))
        for name in (self.ffcv / "ffcv.egg-info" / "requires.txt").read_text().split():
            wanted = "opencv-python-headless" if name == "opencv-python" else name
            head += f"\nRequires-Dist: {wanted}"
        info = content / f"ffcv-{version}.dist-info"
        licenses = info / "licenses"
        licenses.mkdir(parents=True)
        (info / "METADATA").write_text(f"{head}\n\n{text}", encoding="utf-8")
        lines = ["Wheel-Version: 1.0", "Generator: build_ffcv", "Root-Is-Purelib: false"]
        (info / "WHEEL").write_text("\n".join([*lines, f"Tag: {tag}"]) + "\n")
        inside = [self.ffcv / "LICENSE"]
        if not self.system:
            (jpeg,) = (self.folder / "simplejpeg" / "lib").glob("libjpeg-turbo-*")
            inside += [self.opencv / "LICENSE", jpeg / "LICENSE.md", jpeg / "README.ijg"]
        for path in inside:
            shutil.copy(path, licenses / f"{path.parent.name}-{path.name}")

    def cmake(self, name: str, source: Path, goals: list[str], settings: list[str]) -> Path:
        """Configure ``source`` and make the ``goals``; returns the build folder."""
        build = self.folder / "build" / name
        tools = [f"-DCMAKE_{tool.upper()}={self.programs / f'zig-{tool}'}" for tool in ARCHIVERS]
        words = ["cmake", *COMMON, *tools, *settings, "-S", source, "-B", build]
        self.run(f"configuring {name}", words)
        self.run(f"compiling {name}", ["ninja", "-C", build, *goals])
        return build

    def pip(self, what: str, words: Sequence[object], **environment: str) -> None:
        """Run the pip beside this interpreter, as the user has configured it."""
        environment["HOME"] = os.environ.get("HOME", "/")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        self.run(what, [*pip, *words], **environment)

    def run(self, what: str, words: Sequence[object], **environment: str) -> str:
        """Announce a command as ``what`` and run it; returns its standard output."""
        print(f"{time.monotonic() - self.start:6.0f} s  {what}", file=sys.stderr, flush=True)
        command = [str(word) for word in words]
        variables = {**self.environment, **environment}
        try:
            done = subprocess.run(command, env=variables, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise BuildError(f"{what}: {command[0]} is not there") from error
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
            raise BuildError(f"{what} failed with code {done.returncode}:\n{tail}")
        return done.stdout


def replace(path: Path, *changes: tuple[str, str]) -> None:
    """Change each text, which must be in the file once."""
    text = path.read_text()
    for old, new in changes:
        if (count := text.count(old)) != 1:
            found = f"{old!r} is in it {count} times"
            raise BuildError(f"{path.name} of this release is not as expected: {found}")
        text = text.replace(old, new)
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
