#!/bin/sh
# Builds the documentation in build/site and writes nothing else; any warning is an error. Arguments are passed to
# `mkdocs build`; `scripts/docs.sh serve` serves the pages with live reload.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
sh "$root/scripts/setup.sh"
cd -- "$root"
.venv/bin/python -c 'import material, mkdocs' 2>/dev/null \
    || .venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
if [ "${1-}" = serve ]; then
    exec .venv/bin/python -m mkdocs "$@"
fi
export NO_MKDOCS_2_WARNING=1 # an advertisement
exec .venv/bin/python -m mkdocs build --strict --quiet "$@"
