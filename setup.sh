#!/bin/sh
# Set-up for the Makefile: system packages (as root, else through sudo), a virtual environment, dependencies. Asks for nothing.
# Usage: PYTHON=python3 PACKAGES="..." sh setup.sh VENV
set -eu
venv=$1
say() { printf '\n== %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$PYTHON is missing or older than 3.11; install it, or name another: make PYTHON=/path/to/python3.11 ..."

as_root=
[ "$(id -u)" = 0 ] || as_root="sudo -n"
packages=${PACKAGES:?names of system packages}
# Debian's own Python comes without venv and headers; others bring both.
"$PYTHON" -c 'import ensurepip' 2>/dev/null || packages="$packages $("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
header=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"] + "/Python.h")')
[ -f "$header" ] || packages="$packages $("$PYTHON" -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')"
missing=
for package in $packages; do
    # glib was renamed in newer releases, which still provide the old name
    dpkg-query -W -f '${Status}\n' "$package" "${package}t64" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
if [ -n "$missing" ]; then
    say "system packages:$missing"
    command -v apt-get >/dev/null || fail "apt-get is missing: install the equivalents of$missing yourself, then call make again"
    if [ -n "$as_root" ] && ! $as_root true 2>/dev/null; then
        fail "sudo would ask for a password: run  sudo apt-get install$missing  and call make again"
    fi
    $as_root apt-get update -qq
    # shellcheck disable=SC2086
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

say "virtual environment $venv"
[ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
say "dependencies (PyTorch and its libraries are several gigabytes; FFCV is compiled)"
"$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -e ".[server,test]"
say "ready"
