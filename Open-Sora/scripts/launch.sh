#!/bin/sh
# launch.sh DEFAULT_CONFIG [CONFIG] [flags of train_t2v_lora.py] — what the two run_*.sh scripts share.
# NUM_PROCESSES: processes to start (default: one per visible GPU, or one). PYTHON: interpreter to use
# (default: the repository's .venv if there is one, else python3).
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

# A config path counts from where the user stands, or else from Open-Sora/, as the paths in the README do.
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
# mmengine.config is imported for the cache that its first import writes: of several processes that import it
# at once, one could read it half written.
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
    # Without it accelerate starts either one process or several that know nothing of each other.
    export ACCELERATE_USE_CPU=true
elif [ "$processes" -gt "$gpus" ]; then
    fail "NUM_PROCESSES=$processes, but the visible GPUs number $gpus; give at most that."
fi
# Left unset, accelerate gives every process one thread.
threads=$((cores / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

script=$opensora/scripts/train_t2v_lora.py
# One process needs no launcher; without one the script's own message and exit status reach the user.
[ "$processes" -gt 1 ] || exec "$python" "$script" "$config" "$@"
# For the same reason: of several, each would say what is wrong, above the launcher's traceback.
"$python" "$script" "$config" "$@" --check-only "$processes"
# Training compares it with the number of processes that really started.
export VADER_NUM_PROCESSES="$processes"
# The training config owns the precision; accelerate's own default config must not change what is asked here.
# Port 0: any free one, so that two trainings can share a machine.
exec "$python" -m accelerate.commands.launch --multi_gpu --num_processes "$processes" --num_machines 1 \
    --mixed_precision no --dynamo_backend no --main_process_port 0 "$script" "$config" "$@"
