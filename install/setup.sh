#!/bin/sh
# Set-up for the Makefile: a virtual environment with everything in it. Asks for nothing, needs no root and no compiler, and can be
# called again after anything. Usage: sh install/setup.sh VENV [--if-needed]
#   PYTHON       interpreter to use; by default the first of python3, python3.13, python3.12 and python3.11 that is new enough
#   WHEELHOUSE   folder that `make wheelhouse` filled: nothing is downloaded
#   TORCH_INDEX  address of another build of PyTorch, such as https://download.pytorch.org/whl/cpu
set -eu
case $1 in
/*) venv=$1 ;;
*) venv=$PWD/$1 ;;
esac
here=$(dirname "$0")
gigabytes=7.5 # 6.9 in the end, and what pip unpacks on the way
[ -z "${TORCH_INDEX:-}" ] || gigabytes=3
extras="train,explain,server,test"

say() { printf '\n== %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Install Debian's packages where that is allowed; false where it is not.
apt_install() { # PACKAGE ...
    command -v apt-get >/dev/null || return 1
    as_root=
    [ "$(id -u)" = 0 ] || as_root="sudo -n"
    [ -z "$as_root" ] || sudo -n true 2>/dev/null || return 1
    say "system packages: $*"
    $as_root apt-get update -qq && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

find_python() {
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        ! new_enough "$python" || return 0
    done
    [ -z "${PYTHON:-}" ] || fail "$PYTHON is missing or older than 3.11; name another: make PYTHON=/path/to/python3.11 ..."
    python=python3
    if apt_install python3 python3-venv && new_enough python3; then return 0; fi
    fail "Python 3.11 or newer is needed and was not found: load a module (module load python), or ask for the package python3.11 \
and its venv (python3.11-venv on Debian and Ubuntu), or name an interpreter: make PYTHON=/path/to/python3.11 ..."
}

# Debian's Python comes without venv's other half.
need_venv() {
    "$python" -c 'import venv, ensurepip' 2>/dev/null && return 0
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if apt_install "$package" && "$python" -c 'import venv, ensurepip' 2>/dev/null; then return 0; fi
    fail "$python has no venv: ask for the package $package (apt-get install $package), or name another interpreter: \
make PYTHON=/path/to/python3.11 ..."
}

need_room() {
    mkdir -p "$(dirname "$venv")" || fail "$(dirname "$venv") cannot be made (see above)"
    free=$(df -Pk "$(dirname "$venv")" | awk 'NR == 2 { print $4 }')
    enough=$(awk -v free="$free" -v need="$gigabytes" 'BEGIN { print (free >= need * 1e6) }')
    [ "$enough" = 1 ] || fail "$(dirname "$venv") has $((free / 1000000)) GB free, fewer than the $gigabytes that the environment needs; PyTorch for processors \
only needs less than half: make TORCH_INDEX=https://download.pytorch.org/whl/cpu ..."
}

# FFCV's own build serves two kinds of processors; on others it needs a compiler and two libraries of the system.
need_libraries() {
    case $(uname -m) in x86_64 | aarch64) return 0 ;; esac
    pkg-config --exists opencv4 libturbojpeg 2>/dev/null && return 0
    apt_install g++ pkg-config libopencv-dev libturbojpeg0-dev && return 0
    fail "on $(uname -m) FFCV needs a C++ compiler, OpenCV and libjpeg-turbo that pkg-config finds: load such modules, or ask for the \
packages g++, pkg-config, libopencv-dev and libturbojpeg0-dev"
}

# What the environment was made from; when that changes, pip looks again.
state() {
    printf '%s\n' "${TORCH_INDEX:-}"
    cat pyproject.toml constraints.txt "$here"/setup.sh "$here"/*.py "$here"/*.txt
}
# An environment that this script made, here, and whose interpreter still runs; any other is made anew.
works() { [ -f "$venv/made-by-setup" ] && "$venv/bin/python" -c 'import pip' 2>/dev/null && grep -qF "$venv/bin/python" "$venv/bin/pip"; }
ready() { works && [ "$(state | cksum)" = "$(cat "$venv/ready" 2>/dev/null)" ]; }

pip_install() {
    "$venv/bin/python" -m pip --disable-pip-version-check install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$@"
}
# The requirements of pyproject.toml without FFCV, which is built meanwhile.
all_but_ffcv() {
    "$venv/bin/python" -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
names = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
print(*(name.replace(" ", "") for name in names if not name.startswith(("ffcv", project["name"]))))'
}
# What decides which wheels fit: Python, processor, C library.
platform() { "$1" -c 'import platform, sys; print("Python %d.%d" % sys.version_info[:2], platform.machine(), *platform.libc_ver()[:1])'; }

if [ "${2:-}" = --if-needed ] && ready; then exit 0; fi
if [ -n "${WHEELHOUSE:-}" ]; then
    [ -d "$WHEELHOUSE" ] || fail "WHEELHOUSE=$WHEELHOUSE is no folder; \`make wheelhouse\` on a machine with network makes one"
    WHEELHOUSE=$(cd "$WHEELHOUSE" && pwd)
    export PIP_NO_INDEX=1 PIP_FIND_LINKS="$WHEELHOUSE"
    [ "$(cat "$WHEELHOUSE/made-for" 2>/dev/null)" != "" ] || fail "$WHEELHOUSE was not filled to its end: \`make wheelhouse\` again"
fi
find_python
if [ -n "${WHEELHOUSE:-}" ] && [ "$(cat "$WHEELHOUSE/made-for")" != "$(platform "$python")" ]; then
    fail "$WHEELHOUSE is for $(cat "$WHEELHOUSE/made-for"), but $python is $(platform "$python"): name another with PYTHON=... \
or make the wheelhouse with such an interpreter"
fi
[ -n "${WHEELHOUSE:-}" ] || need_libraries
if ! works; then
    need_venv
    need_room
    say "virtual environment $venv with $("$python" -V); it takes about $gigabytes GB and 54,000 files"
    # An earlier set-up left an empty file `ready`.
    [ ! -e "$venv" ] || [ -f "$venv/made-by-setup" ] || [ -f "$venv/ready" ] ||
        fail "$venv is there and was not made by this set-up: move it away, or choose another folder: make VENV=..."
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "$python cannot make a virtual environment in $venv (see above)"
    touch "$venv/made-by-setup"
fi
rm -f "$venv/ready"
log=$venv/ffcv.log
say "dependencies: PyTorch and its libraries are several gigabytes; FFCV is built beside it"
if [ -n "${WHEELHOUSE:-}" ]; then
    pip_install -e ".[$extras]"
else
    "$venv/bin/python" "$here/build_ffcv.py" "$venv/wheels" >"$log" 2>&1 &
    ffcv=$!
    trap 'kill $ffcv 2>/dev/null || true' EXIT
    # shellcheck disable=SC2046
    pip_install $(all_but_ffcv) || fail "pip could not install the dependencies (see above)"
    say "FFCV, for which nothing of this machine is used; log: $log"
    wait $ffcv || fail "FFCV could not be built: $(tail -n 30 "$log")"
    trap - EXIT
    pip_install --find-links "$venv/wheels" --only-binary ffcv -e ".[$extras]"
fi
state | cksum >"$venv/ready"
say "ready: $venv/bin/coda doctor checks this machine"
