#!/bin/sh
# One command from a bare machine to a trained demo: sets up .venv, then trains, compares and reports.
# Arguments are those of scripts/demo/quickstart.py.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
sh "$root/scripts/setup.sh"
exec "$root/.venv/bin/python" "$root/scripts/demo/quickstart.py" "$@"
