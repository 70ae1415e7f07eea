#!/bin/sh
# Train on a Slurm cluster, as `vader train` does: sbatch scripts/slurm_train.sh [CONFIG] [flags]
# One task per GPU. Five minutes before the time limit, and when preempted, training finishes its step and saves;
# the job is requeued and resumes from there. All nodes must share the run folder.
#SBATCH --job-name=vader
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu

[ -n "${SLURM_JOB_ID:-}" ] || {
    printf 'slurm_train: this is for Slurm; submit it with sbatch, or run Open-Sora/scripts/run_text2video_train.sh\n' >&2
    exit 2
}

# Slurm runs a copy of this file, so find the repository through the submit directory.
root=${VADER_ROOT:-$SLURM_SUBMIT_DIR}
vader=$root/Core/__main__.py
[ -f "$vader" ] || {
    printf 'slurm_train: no %s; submit from the repository, or set VADER_ROOT to its path\n' "$vader" >&2
    exit 2
}
case ${1-} in
    '' | -*) set -- "$root/Open-Sora/configs/opensora-v1-2/vader/vader_train.py" "$@" ;;
esac
PYTHON=${PYTHON:-$root/.venv/bin/python}

stopping=
# Forward the signal to the tasks; Slurm sends it only to this shell.
trap 'stopping=yes; scancel --signal=USR1 "$SLURM_JOB_ID" || :' USR1

# Check once here, so that not every task reports the same error.
"$PYTHON" "$vader" train "$@" --check-only "$SLURM_NTASKS"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Jobs on the same node need different ports.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
WORLD_SIZE=$SLURM_NTASKS
VADER_NUM_PROCESSES=$SLURM_NTASKS
OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export PYTHON MASTER_ADDR MASTER_PORT WORLD_SIZE VADER_NUM_PROCESSES OMP_NUM_THREADS

if [ -n "$stopping" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
# A job that was put back into the queue goes on, whatever it was first told.
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || set -- "$@" --resume auto
# exec, so that signals to a task reach its trainer. torchrun would kill the trainer after 30 seconds, even in the
# middle of a step.
# shellcheck disable=SC2016 # each task expands its own variables
srun --kill-on-bad-exit=1 sh -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$PYTHON" "$@"' task "$vader" train "$@" &
step=$!

status=0
wait "$step" || status=$?
# A trapped signal makes `wait` return early.
while kill -0 "$step" 2> /dev/null; do
    status=0
    wait "$step" || status=$?
done

if [ -n "$stopping" ] && [ "$status" -eq 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$status" -gt 3 ]; then
    # A task that a signal or NCCL ended says no sentence of its own.
    printf 'slurm_train: a task or its node is gone (status %s); what it wrote last says why, and the same command continues from what is saved\n' "$status" >&2
fi
exit "$status"
