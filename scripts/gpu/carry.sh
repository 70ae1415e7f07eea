#!/bin/sh
# Packs what a GPU machine without a network lacks into build/carry: see carry.py --help.
# PYTHON=/path/to/python3 sets the interpreter, which needs pip; otherwise .venv is used, or the python3 on the path.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null 2>&1 || python=python3
exec "$python" "$root/scripts/gpu/carry.py" "$@"
