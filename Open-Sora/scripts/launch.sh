#!/bin/sh
# launch.sh COMMAND DEFAULT_CONFIG [CONFIG] [flags]: `vader COMMAND CONFIG [flags]` with the package beside this file.
# Shared by the two run_*.sh scripts. NUM_PROCESSES: processes to start (default: one per visible GPU, or one on CPU).
# PYTHON: interpreter to use (default: the repository's .venv if it exists, else python3).
set -eu

opensora=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
root=$opensora/..
[ ! -d "$opensora/Core" ] || root=$opensora # an upstream checkout with the patch

fail() {
    printf 'launch: %s\n' "$*" >&2
    exit 2
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        printf '%s\n' "$PYTHON"
    elif [ -x "$root/.venv/bin/python" ]; then
        printf '%s\n' "$root/.venv/bin/python"
    else
        printf 'python3\n'
    fi
}

command=$1
config=$opensora/$2
shift 2
case ${1-} in
    '' | -*) ;;
    *)
        config=$1
        shift
        ;;
esac

python=$(find_python)
"$python" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("mmengine")))' \
    || fail "'$python' cannot import torch and mmengine; run scripts/setup.sh or set PYTHON to one that can."
exec "$python" "$root/Core/__main__.py" "$command" "$config" "$@"
