#!/bin/sh
# launch.sh DEFAULT_CONFIG [CONFIG] [flags of train_t2v_lora.py]: shared by the two run_*.sh scripts.
# NUM_PROCESSES: processes to start (default: one per visible GPU, or one on CPU). PYTHON: interpreter to use
# (default: the repository's .venv if it exists, else python3).
set -eu

opensora=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

fail() {
    printf 'launch: %s\n' "$*" >&2
    exit 2
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        printf '%s\n' "$PYTHON"
    elif [ -x "$opensora/../.venv/bin/python" ]; then
        printf '%s\n' "$opensora/../.venv/bin/python"
    else
        printf 'python3\n'
    fi
}

# A config path is relative to the current directory or, failing that, to Open-Sora/.
config_path() {
    if [ ! -e "$1" ] && [ -e "$opensora/$1" ]; then
        printf '%s\n' "$opensora/$1"
    else
        printf '%s\n' "$1"
    fi
}

config=$opensora/$1
shift
case ${1-} in
    '' | -*) ;;
    *)
        config=$(config_path "$1")
        shift
        ;;
esac

python=$(find_python)
# The first import of mmengine.config writes a cache. Import it here, so that no process reads it half-written.
machine=$("$python" -c 'import os, torch, mmengine.config
print(torch.cuda.device_count(), len(os.sched_getaffinity(0)))') \
    || fail "'$python' cannot import torch and mmengine; run scripts/setup.sh or set PYTHON to one that can."
gpus=${machine% *}
cores=${machine#* }

processes=${NUM_PROCESSES:-$((gpus > 0 ? gpus : 1))}
case $processes in
    *[!0-9]* | 0*) fail "NUM_PROCESSES='$processes' is not a number of processes; give 1 or more." ;;
esac
if [ "$gpus" -eq 0 ]; then
    # Otherwise accelerate starts either one process or several that do not communicate.
    export ACCELERATE_USE_CPU=true
elif [ "$processes" -gt "$gpus" ]; then
    fail "NUM_PROCESSES=$processes, but the visible GPUs number $gpus; give at most that."
fi
# If unset, accelerate gives every process one thread.
threads=$((cores / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

script=$opensora/scripts/train_t2v_lora.py
# Run a single process without a launcher, so that its message and exit status reach the user.
[ "$processes" -gt 1 ] || exec "$python" "$script" "$config" "$@"
# Check once for several processes; otherwise each reports the same error above the launcher's traceback.
"$python" "$script" "$config" "$@" --check-only "$processes"
# Training compares this with the number of processes that actually started.
export VADER_NUM_PROCESSES="$processes"
# The training config sets the precision; these flags override accelerate's default config.
# Port 0 picks any free port, so two runs can share a machine.
exec "$python" -m accelerate.commands.launch --multi_gpu --num_processes "$processes" --num_machines 1 \
    --mixed_precision no --dynamo_backend no --main_process_port 0 "$script" "$config" "$@"
