"""The parts of FFCV, OpenCV and libjpeg-turbo that ``build_ffcv.py`` needs, and CMake's options."""

# Source archive -> how the names of the files begin that are unpacked.
NEEDED_FILES = {
    "ffcv": ["ffcv/", "libffcv/", "ffcv.egg-info/requires.txt", "LICENSE", "PKG-INFO"],
    "simplejpeg": ["lib/"],
    "opencv-python-headless": [
        *("opencv/CMakeLists.txt", "opencv/LICENSE"),
        *("opencv/cmake/", "opencv/include/", "opencv/data/"),
        *("opencv/modules/core/", "opencv/modules/imgproc/", "opencv/modules/world/"),
        "opencv/modules/CMakeLists.txt",
        *("opencv/samples/CMakeLists.txt", "opencv/apps/CMakeLists.txt"),
        *("opencv/doc/CMakeLists.txt", "opencv/3rdparty/zlib/", "opencv/platforms/"),
    ],
}

# CMake's options for every library.
COMMON = [
    *("-G", "Ninja", "-Wno-dev", "-DCMAKE_BUILD_TYPE=Release"),
    "-DCMAKE_POSITION_INDEPENDENT_CODE=ON",
    # Nothing is linked while CMake looks around: Zig would first compile all of the C++ library
    # for it.
    "-DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY",
]
YASM = ["-DBUILD_SHARED_LIBS=OFF", "-DYASM_BUILD_TESTS=OFF"]
JPEG = ["-DENABLE_SHARED=OFF", "-DREQUIRE_SIMD=ON"]
# OpenCV without threads of its own: FFCV resizes one image in each of its threads.
_WITHOUT = (
    *("IPP", "OPENCL", "ITT", "LAPACK", "EIGEN", "ADE", "QUIRC", "PROTOBUF", "PTHREADS_PF"),
    *("JASPER", "JPEG", "OPENEXR", "OPENJPEG", "PNG", "TIFF", "WEBP"),
)
_OFF = ("BUILD_SHARED_LIBS", "BUILD_TESTS", "BUILD_PERF_TESTS", "BUILD_opencv_apps", "CV_TRACE")
OPENCV = [
    *("-DBUILD_LIST=core,imgproc", "-DBUILD_ZLIB=ON"),
    # No code by processor type: the mean of an area gains nothing from it.
    "-DCPU_DISPATCH=",
    *(f"-DWITH_{name}=OFF" for name in _WITHOUT),
    *(f"-D{name}=OFF" for name in _OFF),
]

# The files of OpenCV 4.6.0 from which cv::resize is linked: a seventh of its two modules.
CORE = [
    *("alloc", "buffer_area", "check", "convert.dispatch", "convert_scale.dispatch", "copy"),
    *("glob", "logger", "matrix", "matrix_iterator", "matrix_wrap", "parallel"),
    *("parallel/parallel", "rand", "softfloat", "system", "trace", "umatrix"),
    *("utils/datafile", "utils/filesystem", "utils/logtagconfigparser", "utils/logtagmanager"),
]
# Processor -> files.
IMGPROC = {"x86_64": ["resize", "resize.sse4_1"], "aarch64": ["resize"]}
