#!/bin/sh
# Fill FOLDER with wheels of everything that set-up installs, for machines without network that
# have the same Python version and kind of processor:
#   sh install/wheelhouse.sh VENV FOLDER
# On such a machine `make setup WHEELHOUSE=FOLDER` installs from it.
set -eu
python=$1/bin/python
folder=$2
here=$(dirname "$0")
mkdir -p "$folder"
rm -f "$folder/made-for"
cp "$1"/wheels/ffcv-*.whl "$folder/" 2>/dev/null || "$python" "$here/build_ffcv.py" "$folder"
# hatchling and editables are needed to install the project itself.
"$python" -m pip --disable-pip-version-check wheel --wheel-dir "$folder" --find-links "$folder" \
    --only-binary ffcv -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    ".[train,explain,server,test]" hatchling editables
"$python" "$here/platform_name.py" >"$folder/made-for"
size=$(du -sh "$folder" | cut -f1)
printf '\n== %s: %s for %s; there: make setup WHEELHOUSE=...\n' \
    "$folder" "$size" "$(cat "$folder/made-for")"
