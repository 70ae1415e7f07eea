#!/bin/sh
# Sets up .venv and runs the test suite. Arguments are passed to pytest; paths are relative to the repository root.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
sh "$root/scripts/setup.sh"
cd -- "$root"
# Two workers with one thread each: the test models are too small to benefit from more threads.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n 2 "$@"
