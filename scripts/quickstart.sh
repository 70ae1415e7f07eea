#!/bin/sh
# Sets up .venv on a bare machine, then trains the demo, compares it with the base model and reports.
# Arguments are passed to scripts/demo/quickstart.py.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
sh "$root/scripts/setup.sh"
exec "$root/.venv/bin/python" "$root/scripts/demo/quickstart.py" "$@"
