#!/bin/sh
# Set-up for the Makefile: a virtual environment with everything in it. Asks for nothing, needs no
# root and no compiler, and can be called again after anything.
#   sh install/setup.sh VENV [--if-needed]
#   PYTHON       interpreter; by default the first of python3, python3.13, python3.12 and python3.11
#                that is new enough
#   WHEELHOUSE   folder that `make wheelhouse` filled: nothing is downloaded
#   TORCH_INDEX  address of another build of PyTorch: https://download.pytorch.org/whl/cpu
set -eu
case $1 in
/*) venv=$1 ;;
*) venv=$PWD/$1 ;;
esac
here=$(dirname "$0")
# 6.9 in the end, and what pip unpacks on the way.
gigabytes=7.5
[ -z "${TORCH_INDEX:-}" ] || gigabytes=3
extras="train,explain,server,test"
cpu_index=https://download.pytorch.org/whl/cpu

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
    $as_root apt-get update -qq || return 1
    $as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

find_python() {
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        ! new_enough "$python" || return 0
    done
    [ -z "${PYTHON:-}" ] ||
        fail "$PYTHON is missing or older than 3.11; name another:" \
            "make PYTHON=/path/to/python3.11 ..."
    python=python3
    if apt_install python3 python3-venv && new_enough python3; then return 0; fi
    fail "Python 3.11 or newer is needed and was not found: load a module (module load python)," \
        "or ask for the package python3.11 and its venv (python3.11-venv on Debian and Ubuntu)," \
        "or name an interpreter: make PYTHON=/path/to/python3.11 ..."
}

# Debian's Python comes without venv's other half.
need_venv() {
    "$python" -c 'import venv, ensurepip' 2>/dev/null && return 0
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if apt_install "$package" && "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        return 0
    fi
    fail "$python has no venv: ask for the package $package (apt-get install $package)," \
        "or name another interpreter: make PYTHON=/path/to/python3.11 ..."
}

need_room() {
    folder=$(dirname "$venv")
    mkdir -p "$folder" || fail "$folder cannot be made (see above)"
    free=$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')
    [ "$(awk -v free="$free" -v need="$gigabytes" 'BEGIN { print (free >= need * 1e6) }')" = 1 ] ||
        fail "$folder has $((free / 1000000)) GB free, fewer than the $gigabytes that the" \
            "environment needs; PyTorch for processors only needs less than half:" \
            "make TORCH_INDEX=$cpu_index ..."
}

# FFCV's own build serves two kinds of processors; others need a compiler and two libraries.
need_libraries() {
    case $(uname -m) in x86_64 | aarch64) return 0 ;; esac
    pkg-config --exists opencv4 libturbojpeg 2>/dev/null && return 0
    apt_install g++ pkg-config libopencv-dev libturbojpeg0-dev && return 0
    fail "on $(uname -m) FFCV needs a C++ compiler, OpenCV and libjpeg-turbo that pkg-config" \
        "finds: load such modules, or ask for the packages g++, pkg-config, libopencv-dev and" \
        "libturbojpeg0-dev"
}

# What the environment was made from; when that changes, pip looks again.
state() { cat pyproject.toml constraints.txt "$here"/*.sh "$here"/*.py "$here"/*.txt; }
ffcv_state() { cat "$here"/build_ffcv.py "$here"/ffcv_*; }

# An environment that this script made, here, and whose interpreter still runs.
works() {
    [ -f "$venv/made-by-setup" ] && "$venv/bin/python" -c 'import pip' 2>/dev/null &&
        grep -qF "$venv/bin/python" "$venv/bin/pip"
}
ready() { works && [ "$(state | cksum)" = "$(cat "$venv/ready" 2>/dev/null)" ]; }

make_environment() {
    # An earlier set-up left an empty file `ready`.
    [ ! -e "$venv" ] || [ -f "$venv/made-by-setup" ] || [ -f "$venv/ready" ] ||
        fail "$venv is there and was not made by this set-up: move it away," \
            "or choose another folder: make VENV=..."
    need_venv
    need_room
    say "virtual environment $venv with $("$python" -V); about $gigabytes GB and 54,000 files"
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "$python cannot make an environment in $venv (see above)"
    touch "$venv/made-by-setup"
}

# Old versions of pip would call setup.py, and say that they should not.
export PIP_USE_PEP517=1
pip_install() {
    "$venv/bin/python" -m pip --disable-pip-version-check install -c constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$@"
}

# The requirements of the extras without FFCV, which is built meanwhile.
all_but_ffcv() {
    "$venv/bin/python" -c 'import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = [project["optional-dependencies"][name] for name in sys.argv[1].split(",")]
own = ("ffcv", project["name"])
names = sum(extras, project["dependencies"])
print(*(name.replace(" ", "") for name in names if not name.startswith(own)))' "$extras"
}

install_from_network() {
    log=$venv/ffcv.log
    # A wheel that another version of the project built does not count.
    [ "$(ffcv_state | cksum)" = "$(cat "$venv/wheels/made-from" 2>/dev/null)" ] ||
        rm -rf "$venv/wheels"
    "$venv/bin/python" "$here/build_ffcv.py" "$venv/wheels" >"$log" 2>&1 &
    ffcv=$!
    trap 'kill $ffcv 2>/dev/null || true' EXIT
    trap 'exit 130' INT TERM
    # shellcheck disable=SC2046
    pip_install $(all_but_ffcv) || fail "pip could not install the dependencies (see above)"
    say "FFCV, for which nothing of this machine is used; log: $log"
    wait $ffcv || fail "FFCV could not be built: $(tail -n 30 "$log")"
    trap - EXIT INT TERM
    ffcv_state | cksum >"$venv/wheels/made-from"
    pip_install --force-reinstall --no-deps "$venv"/wheels/ffcv-*.whl
    pip_install --find-links "$venv/wheels" --only-binary ffcv -e ".[$extras]"
}

if [ "${2:-}" = --if-needed ] && ready; then exit 0; fi
find_python
if [ -n "${WHEELHOUSE:-}" ]; then
    [ -d "$WHEELHOUSE" ] ||
        fail "WHEELHOUSE=$WHEELHOUSE is not a folder;" \
            "\`make wheelhouse\` on a machine with network makes one"
    WHEELHOUSE=$(cd "$WHEELHOUSE" && pwd)
    export PIP_NO_INDEX=1 PIP_FIND_LINKS="$WHEELHOUSE"
    made_for=$(cat "$WHEELHOUSE/made-for" 2>/dev/null) ||
        fail "$WHEELHOUSE was not filled to its end: \`make wheelhouse\` again"
    [ "$made_for" = "$("$python" "$here/platform_name.py")" ] ||
        fail "$WHEELHOUSE is for $made_for, but $python is $("$python" "$here/platform_name.py"):" \
            "name another with PYTHON=..., or make the wheelhouse with such an interpreter"
else
    need_libraries
fi
works || make_environment
rm -f "$venv/ready"
say "dependencies: PyTorch and its libraries are several gigabytes; FFCV is built beside it"
if [ -n "${WHEELHOUSE:-}" ]; then
    pip_install -e ".[$extras]"
else
    install_from_network
fi
broken=$("$venv/bin/python" -I "$here/damaged.py")
if [ -n "$broken" ]; then
    say "installing again, as files are missing: $(echo "$broken" | tr '\n' ' ')"
    # shellcheck disable=SC2086
    pip_install --force-reinstall --no-deps --find-links "$venv/wheels" $broken
fi
state | cksum >"$venv/ready"
say "ready: $venv/bin/coda doctor checks this machine"
