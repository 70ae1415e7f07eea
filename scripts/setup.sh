#!/bin/sh
# Creates .venv in the repository root and installs the pinned requirements.txt and this project into it.
# A stamp in .venv makes later runs instant. PYTHON=/path/to/python3 sets the interpreter of a new .venv.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=$root/.venv
stamp=$venv/installed

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}

recent_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Prints the interpreter for a new .venv: $PYTHON if set, else the first one on PATH that is recent enough.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        recent_enough "$PYTHON" || fail "PYTHON='$PYTHON' is no working Python 3.11 or newer; set it to one."
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if recent_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer on the path; install one or set PYTHON to it."
}

# Includes the root: after a copy or move, an editable install still points to the old location.
wanted() {
    { printf '%s\n' "$root" && cat "$root/requirements.txt" "$root/pyproject.toml"; } | cksum
}

is_current() {
    [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted)" ]
}

install() {
    # If the venv module is incomplete, a first attempt leaves a .venv without pip.
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        interpreter=$(find_python)
        "$interpreter" -m venv --clear "$venv"
    fi
    echo "setup: installing requirements.txt into .venv (a minute or two; longer with CUDA packages)"
    set -- "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --quiet
    "$@" --requirement "$root/requirements.txt"
    "$@" --no-deps --no-build-isolation --editable "$root"
    # The first import of mmengine.config writes a cache; do it now, so no other process reads it half-written.
    "$venv/bin/python" -c 'import mmengine.config, Core'
    wanted >"$stamp"
}

is_current && exit 0
# Simultaneous first runs take turns; the second finds the work already done.
if command -v flock >/dev/null; then
    exec 9>"$root/.venv.lock"
    flock 9
fi
if ! is_current; then
    install
fi
