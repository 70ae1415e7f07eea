#!/bin/sh
# Sets up .venv and runs the test suite. Arguments are passed to pytest; paths are relative to the repository root.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
sh "$root/scripts/setup.sh"
cd -- "$root"
# Two workers with one thread each: the test models are too small to benefit from more threads.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Neighbours share fixtures: a worker takes half of the tests in their order, and then from the other what is left.
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
