#!/bin/sh
# Fill FOLDER with wheels of everything that set-up installs, for machines without network and the same kind of Python and processor:
#   sh install/wheelhouse.sh VENV FOLDER        there:  make setup WHEELHOUSE=FOLDER
set -eu
venv=$1
folder=$2
here=$(dirname "$0")
mkdir -p "$folder"
rm -f "$folder/made-for"
cp "$venv"/wheels/ffcv-*.whl "$folder/" 2>/dev/null || "$venv/bin/python" "$here/build_ffcv.py" "$folder"
# hatchling and editables install the project itself
"$venv/bin/python" -m pip --disable-pip-version-check wheel --wheel-dir "$folder" --find-links "$folder" --only-binary ffcv -c constraints.txt \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[train,explain,server,test]" hatchling editables
"$venv/bin/python" -c 'import platform, sys; print("Python %d.%d" % sys.version_info[:2], platform.machine(), *platform.libc_ver()[:1])' >"$folder/made-for"
printf '\n== %s: %s for %s; there: make setup WHEELHOUSE=...\n' "$folder" "$(du -sh "$folder" | cut -f1)" "$(cat "$folder/made-for")"
