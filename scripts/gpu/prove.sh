#!/bin/sh
# Proves on a GPU what this project says of itself, offline, in at most nine minutes: see prove.py --help.
# PYTHON=/path/to/python3 sets the interpreter; otherwise .venv is used, or the python3 on the path.
# Packages that the interpreter lacks come from build/carry, where scripts/gpu/carry.sh put them.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
carried=$root/build/carry/packages.tar.xz
site=$root/build/gpu/site
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null 2>&1 || python=python3

unpack() {
    rm -rf "$site"
    mkdir -p "$site"
    "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
        "$carried" "$site"
    touch "$site"
}

if [ -f "$carried" ] && ! "$python" -c 'import av, diffusers, ftfy, mmengine' 2>/dev/null; then
    [ "$site" -nt "$carried" ] || unpack
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" "$root/scripts/gpu/prove.py" "$@"
