"""Build FFCV as a wheel that needs nothing of the system: ``python build_ffcv.py FOLDER`` prints the path of the wheel.

FFCV's sources compile against OpenCV and libjpeg-turbo of the system, of which they use one function and one decoder. Here both are
compiled from sources and become part of FFCV's library, with Zig's C and C++ compiler, for glibc 2.17 and newer and for every Python 3.
Sources and tools come through pip, so that mirrors, proxies and wheelhouses serve as for everything else; no compiler, header, root or
writable home is needed. On other processors than x86-64 and 64-bit ARM, or with ``--system``, the system's compiler and its OpenCV and
libjpeg-turbo are used, as pkg-config finds them, and the library remembers where they are.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGETS = {"x86_64": "x86_64-linux-gnu.2.17", "aarch64": "aarch64-linux-gnu.2.17"}
LIBRARIES = ("opencv4", "libturbojpeg")  # pkg-config's names
NEEDED = {  # of each source archive: prefix of what is unpacked
    "ffcv": ("ffcv/", "libffcv/", "ffcv.egg-info/requires.txt", "LICENSE", "PKG-INFO"),
    "opencv-python-headless": (
        *(f"opencv/{name}" for name in ("CMakeLists.txt", "LICENSE", "cmake/", "include/", "data/", "samples/CMakeLists.txt")),
        *(f"opencv/{name}" for name in ("modules/core/", "modules/imgproc/", "modules/CMakeLists.txt", "modules/world/")),
        *(f"opencv/{name}" for name in ("3rdparty/zlib/", "platforms/", "apps/CMakeLists.txt", "doc/CMakeLists.txt")),
    ),
    "simplejpeg": ("lib/",),
}
COMMON = ("-G", "Ninja", "-Wno-dev", "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_POSITION_INDEPENDENT_CODE=ON")
# Nothing is linked while CMake looks around: Zig would first compile all of the C++ library for that, without optimisation.
COMMON += ("-DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY",)
JPEG = ("-DENABLE_SHARED=OFF", "-DREQUIRE_SIMD=ON")
# No OpenCV threads: FFCV decodes one image in each of its own. No code by processor type: resizing to the mean of an area gains nothing.
OPENCV_OFF = (
    *(f"-DWITH_{name}=OFF" for name in ("IPP", "OPENCL", "ITT", "LAPACK", "EIGEN", "ADE", "QUIRC", "PROTOBUF", "PTHREADS_PF")),
    *(f"-DWITH_{name}=OFF" for name in ("JASPER", "JPEG", "OPENEXR", "OPENJPEG", "PNG", "TIFF", "WEBP")),
    *(f"-D{name}=OFF" for name in ("BUILD_SHARED_LIBS", "BUILD_TESTS", "BUILD_PERF_TESTS", "BUILD_opencv_apps", "CV_TRACE")),
)
OPENCV = ("-DBUILD_LIST=core,imgproc", "-DBUILD_ZLIB=ON", "-DCPU_DISPATCH=", *OPENCV_OFF)
# The files of OpenCV 4.6.0 from which cv::resize is linked; all of its two modules would take ten times as long.
CORE = (
    *("alloc", "buffer_area", "check", "convert.dispatch", "convert_scale.dispatch", "copy", "glob", "logger", "matrix"),
    *("matrix_iterator", "matrix_wrap", "parallel", "parallel/parallel", "rand", "softfloat", "system", "trace", "umatrix"),
    *(f"utils/{name}" for name in ("datafile", "filesystem", "logtagconfigparser", "logtagmanager")),
)
IMGPROC = {"x86_64": ("resize", "resize.sse4_1"), "aarch64": ("resize",)}


class Failure(Exception):
    """A step that did not work, in words for the user."""


def main() -> int:
    """Build unless the wheel is there, and print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheel goes")
    parser.add_argument("--system", action="store_true", help="compile against the system's OpenCV and libjpeg-turbo")
    options = parser.parse_args()
    machine = platform.machine()
    system = options.system or machine not in TARGETS
    tag = f"py3-none-{'linux' if system else 'manylinux_2_17'}_{machine}"
    options.folder.mkdir(parents=True, exist_ok=True)
    if found := sorted(options.folder.glob(f"ffcv-*-{tag}.whl")):
        print(found[-1])
        return 0
    try:
        with tempfile.TemporaryDirectory(prefix="coda-ffcv-") as folder:
            print(Build(Path(folder), system).wheel(tag, options.folder))
    except Failure as failure:
        print(f"build_ffcv: {failure}", file=sys.stderr)
        return 2
    return 0


class Build:
    """One build in a temporary folder."""

    def __init__(self, folder: Path, system: bool) -> None:
        self.folder, self.system, self.start = folder, system, time.monotonic()
        self.python = folder / "tools" / "bin" / "python"
        self.target = TARGETS.get(platform.machine(), "")
        self.environment = {
            **os.environ,
            "PATH": f"{self.python.parent}:{os.environ.get('PATH', os.defpath)}",
            "ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"),
            "ZIG_LOCAL_CACHE_DIR": str(folder / "zig"),
            "HOME": str(folder),
        }

    def wheel(self, tag: str, destination: Path) -> Path:
        """Everything, from the download on; returns the path of the wheel in ``destination``."""
        self.tools()
        self.sources()
        content = self.folder / "wheel"
        shutil.copytree(self.folder / "ffcv" / "ffcv", content / "ffcv")
        library = content / "ffcv" / "_libffcv.so"
        source = self.library_source()
        if self.system:
            self.link_to_system(source, library)
        else:
            self.link_statically(source, library)
        replace(
            content / "ffcv" / "libffcv.py",
            ("import ffcv._libffcv\n", "from pathlib import Path\n"),
            ("CDLL(ffcv._libffcv.__file__)", 'CDLL(str(Path(__file__).with_name("_libffcv.so")))'),
        )
        self.describe(content, tag)
        (self.folder / "out").mkdir()
        self.run("packing", self.python, "-m", "wheel", "pack", content, "--dest-dir", self.folder / "out")
        (made,) = (self.folder / "out").glob("*.whl")
        part = destination / f".{made.name}.part"
        shutil.copyfile(made, part)
        return part.rename(destination / made.name)

    def tools(self) -> None:
        """CMake, Ninja and Zig in an environment of their own."""
        venv.create(self.folder / "tools", with_pip=False, symlinks=True)
        words = ("wheel", "-c") if self.system else ("-r",)
        self.pip("downloading tools", "--python", self.python, "install", *words, HERE / "ffcv_tools.txt")
        if self.system:
            return
        for name, command in (("zig-cc", "cc"), ("zig-c++", "c++")):
            script = self.python.with_name(name)
            # Only the last link needs the C++ library, which Zig compiles first; CMake links to see how the compiler is called.
            script.write_text(
                "#!/bin/sh\n"
                'case " $* " in *" -c "* | *" -E "*) ;; *) set -- -nostdlib++ "$@" ;; esac\n'
                f'exec {shlex.join(map(str, self.zig(command)))} "$@"\n'
            )
            script.chmod(0o755)
        for name in ("ar", "ranlib"):
            script = self.python.with_name(f"zig-{name}")
            script.write_text(f"#!/bin/sh\nexec '{self.python}' -m ziglang {name} \"$@\"\n")
            script.chmod(0o755)
        self.environment |= {"CC": str(self.python.with_name("zig-cc")), "CXX": str(self.python.with_name("zig-c++"))}

    def zig(self, command: str) -> list[object]:
        """Words that call Zig's ``cc`` or ``c++`` for the target; yasm states the date on which it was compiled."""
        return [self.python, "-m", "ziglang", command, "-target", self.target, "-Wno-error=date-time"]

    def sources(self) -> None:
        """Download, check and unpack the source archives."""
        archives = self.folder / "archives"
        environment = {"PYTHONPATH": str(HERE / "metadata_only")}
        wanted = self.folder / "sources.txt"
        lines = (HERE / "ffcv_sources.txt").read_text().splitlines(keepends=True)
        wanted.write_text("".join(line for line in lines if not self.system or line.startswith("ffcv")))
        words = (
            "download",
            "--dest",
            archives,
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            "--use-pep517",
            "--require-hashes",
        )
        self.pip("downloading sources", *words, "-r", wanted, **environment)
        for path in sorted(archives.iterdir()):
            name = path.name.rsplit("-", 1)[0]
            with tarfile.open(path) as archive:
                for member in archive:
                    inside = member.name.partition("/")[2]
                    if member.isfile() and inside.startswith(NEEDED[name]):
                        target = self.folder / name / inside
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with archive.extractfile(member) as content, target.open("wb") as file:  # type: ignore[union-attr]
                            shutil.copyfileobj(content, file)

    def library_source(self) -> Path:
        """FFCV's C++ file without the empty Python module around it, and with the two headers of OpenCV that it needs."""
        path = self.folder / "ffcv" / "libffcv" / "libffcv.cpp"
        replace(
            path,
            ("#include <Python.h>\n", ""),
            ("#include <opencv2/opencv.hpp>\n", "#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n"),
        )
        text = path.read_text()
        path.write_text(text[: text.index("    static PyMethodDef")] + "}\n")
        return path

    def link_statically(self, source: Path, library: Path) -> None:
        """Compile the assembler, libjpeg-turbo, two modules of OpenCV, and FFCV's library from all of them."""
        (jpeg_source,) = (self.folder / "simplejpeg" / "lib").glob("libjpeg-turbo-*")
        (yasm_source,) = (self.folder / "simplejpeg" / "lib").glob("yasm-*")
        assembler, baseline = [], []
        if platform.machine() == "x86_64":
            yasm = self.cmake("yasm", yasm_source, "yasm", settings=("-DBUILD_SHARED_LIBS=OFF", "-DYASM_BUILD_TESTS=OFF"))
            assembler = [f"-DCMAKE_ASM_NASM_COMPILER={yasm / 'yasm'}"]
            baseline = ["-DCPU_BASELINE=SSE4_2"]
        jpeg = self.cmake("libjpeg-turbo", jpeg_source, "turbojpeg-static", settings=(*JPEG, *assembler))
        opencv_source = self.folder / "opencv-python-headless" / "opencv"
        opencv, objects = self.opencv(opencv_source, *baseline)
        headers = [opencv, jpeg_source, *(opencv_source / "modules" / module / "include" for module in ("core", "imgproc"))]
        exports = self.folder / "exports"
        exports.write_text("{ global: resize; my_memcpy; my_fread; imdecode; local: *; };\n")
        words = ["-O3", "-fPIC", "-shared", "-s", "-Wl,-z,defs", "-Wl,--gc-sections", f"-Wl,--version-script={exports}"]
        words += [*(f"-I{folder}" for folder in headers), source, *objects, jpeg / "libturbojpeg.a", "-lpthread", "-ldl"]
        self.run("linking", *self.zig("c++"), *words, "-o", library)

    def opencv(self, source: Path, *settings: str) -> tuple[Path, list[Path]]:
        """Compile the needed files of OpenCV; returns the build folder, where its made headers are, and the object files."""
        core, imgproc = (f"modules/{name}/CMakeFiles/opencv_{name}.dir/src" for name in ("core", "imgproc"))
        of_core = [f"{core}/{name}.cpp.o" for name in CORE]
        of_imgproc = [f"{imgproc}/{name}.cpp.o" for name in IMGPROC[platform.machine()]]
        build = self.cmake("opencv", source, *of_core, settings=(*OPENCV, *settings))
        # Ninja would compile all of the core before these, and make this header, of which no more is left without OpenCL.
        (build / "modules" / "imgproc").mkdir(parents=True, exist_ok=True)
        (build / "modules" / "imgproc" / "opencl_kernels_imgproc.hpp").write_text('#include "opencv2/core/opencl/ocl_defs.hpp"\n')
        for name in of_imgproc:
            commands = self.run(f"compiling {name.rpartition('/')[2]}", "ninja", "-C", build, "-t", "commands", name)
            (build / name).parent.mkdir(parents=True, exist_ok=True)
            self.run(f"compiling {name.rpartition('/')[2]}", "sh", "-c", f"cd '{build}' && {commands.splitlines()[-1]}")
        return build, [build / name for name in (*of_core, *of_imgproc)]

    def link_to_system(self, source: Path, library: Path) -> None:
        """Compile FFCV's library against what pkg-config knows, with the folders of those libraries in its search path."""
        found = {}
        for question in ("--cflags", "--libs-only-L", "--variable=libdir"):
            answers = [self.run("looking for libraries", "pkg-config", question, name) for name in LIBRARIES]
            found[question] = shlex.split(" ".join(answers))
        folders = [f"-Wl,-rpath,{folder}" for folder in dict.fromkeys(found["--variable=libdir"])]
        words = [*shlex.split(os.environ.get("CXX", "c++")), "-O3", "-fPIC", "-shared", *found["--cflags"], source]
        words += [*found["--libs-only-L"], *folders, "-lopencv_imgproc", "-lopencv_core", "-lturbojpeg", "-lpthread"]
        self.run("linking", *words, "-o", library)

    def describe(self, content: Path, tag: str) -> None:
        """FFCV's metadata with OpenCV's headless build in place of the other, and the licences of all that is inside."""
        source = self.folder / "ffcv"
        head, _, text = (source / "PKG-INFO").read_text(encoding="utf-8").partition("\n\n")
        version = next(line.split()[1] for line in head.splitlines() if line.startswith("Version:"))
        needs = (source / "ffcv.egg-info" / "requires.txt").read_text().split()
        for name in needs:
            head += f"\nRequires-Dist: {'opencv-python-headless' if name == 'opencv-python' else name}"
        info = content / f"ffcv-{version}.dist-info"
        licenses = info / "licenses"
        licenses.mkdir(parents=True)
        (info / "METADATA").write_text(f"{head}\n\n{text}", encoding="utf-8")
        (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nGenerator: build_ffcv\nRoot-Is-Purelib: false\nTag: {tag}\n")
        shutil.copy(source / "LICENSE", licenses / "LICENSE.ffcv")
        if not self.system:
            shutil.copy(self.folder / "opencv-python-headless" / "opencv" / "LICENSE", licenses / "LICENSE.opencv")
            for path in (self.folder / "simplejpeg" / "lib").glob("libjpeg-turbo-*/[LR]*E*.[mi][dj]*"):
                shutil.copy(path, licenses / f"{path.name}.libjpeg-turbo")

    def cmake(self, name: str, source: Path, *goals: str, settings: tuple[str, ...]) -> Path:
        """Configure ``source`` and make the ``goals``; returns the build folder."""
        build = self.folder / "build" / name
        archivers = [f"-DCMAKE_{tool.upper()}={self.python.with_name(f'zig-{tool}')}" for tool in ("ar", "ranlib")]
        self.run(f"configuring {name}", "cmake", *COMMON, *archivers, *settings, "-S", source, "-B", build)
        self.run(f"compiling {name}", "ninja", "-C", build, *goals)
        return build

    def pip(self, what: str, *words: object, **environment: str) -> None:
        """The pip beside this interpreter, as the user has configured it."""
        self.run(
            what, sys.executable, "-m", "pip", "--disable-pip-version-check", *words, **{"HOME": os.environ.get("HOME", "/"), **environment}
        )

    def run(self, what: str, *words: object, **environment: str) -> str:
        """Standard output of a command, announced as ``what``."""
        print(f"{time.monotonic() - self.start:6.0f} s  {what}", file=sys.stderr, flush=True)
        try:
            done = subprocess.run([str(word) for word in words], env={**self.environment, **environment}, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise Failure(f"{what}: {words[0]} is not there") from error
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
            raise Failure(f"{what} failed with code {done.returncode}:\n{tail}")
        return done.stdout


def replace(path: Path, *changes: tuple[str, str]) -> None:
    """Change each text, which must stand in the file once."""
    text = path.read_text()
    for old, new in changes:
        if text.count(old) != 1:
            raise Failure(f"{path.name} of this release is not as expected: {old!r} stands in it {text.count(old)} times")
        text = text.replace(old, new)
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
