"""The Slurm script, with stand-ins for Slurm's commands."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "slurm_train.sh"
FAKES = {
    # Two tasks, as srun starts them; a signal reaches the tasks through their ids in a file.
    "srun": """shift
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    echo $! >> "$FAKE/tasks"
done
wait""",
    "scancel": 'kill -USR1 $(cat "$FAKE/tasks" 2>/dev/null)',
    "scontrol": 'case $1 in show) printf "node7\\nnode8\\n" ;; requeue) echo "$2" > "$FAKE/requeued" ;; esac',
    # The trainer: tells what it was given, then waits for the signal if it is to be stopped.
    "python": """case "$*" in *--check-only*)
    echo "$*" > "$FAKE/checked"
    while [ -n "${HOLD:-}" ] && [ ! -e "$FAKE/go" ]; do sleep 0.05; done
    exit "${REFUSE:-0}" ;;
esac
echo "$RANK $LOCAL_RANK $WORLD_SIZE $VADER_NUM_PROCESSES $MASTER_ADDR $MASTER_PORT $*" >> "$FAKE/told"
stop=
trap stop=yes USR1
if [ -n "${WAIT:-}" ]; then
    : > "$FAKE/ready$RANK"
    while [ -z "$stop" ]; do sleep 0.05; done
    echo saved >> "$FAKE/saved"
fi""",
}


@pytest.fixture(params=[shell for shell in ("sh", "bash") if shutil.which(shell)])
def submit(request, tmp_path):
    """A function that runs the script as a job would, with the fakes; the folder they write to."""
    root = tmp_path / "a checkout"
    for folder in (root / "Core", root / "bin"):
        folder.mkdir(parents=True)
    (root / "Core" / "__main__.py").touch()
    for name, body in FAKES.items():
        (root / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (root / "bin" / name).chmod(0o755)

    def run(*flags, **extra):
        env = os.environ | dict(
            PATH=f"{root / 'bin'}:{os.environ['PATH']}", PYTHON=str(root / "bin" / "python"), FAKE=str(root),
            SLURM_JOB_ID="31337", SLURM_SUBMIT_DIR=str(root), SLURM_JOB_NODELIST="node[7-8]", SLURM_NTASKS="2",
            **extra,
        )  # fmt: skip
        return subprocess.Popen([request.param, str(SCRIPT), *flags], env=env)

    return run, root


def test_every_task_learns_its_place(submit):
    run, root = submit
    assert run("my config.py", "--lr", "1e-4").wait(20) == 0
    told = sorted((root / "told").read_text().splitlines())
    train = f"{root / 'Core' / '__main__.py'} train"
    assert told == [f"{rank} {rank} 2 2 node7 31337 {train} my config.py --lr 1e-4" for rank in (0, 1)]
    assert (root / "checked").read_text() == f"{train} my config.py --lr 1e-4 --check-only 2\n"
    assert not (root / "requeued").exists()


def test_a_config_error_ends_the_job_before_any_task(submit):
    run, root = submit
    assert run("my config.py", REFUSE="2").wait(20) == 2
    assert not (root / "told").exists()


def test_a_job_told_to_stop_saves_and_goes_back_to_the_queue(submit):
    run, root = submit
    job = run("--max-train-steps", "3", WAIT="1")
    subprocess.run(
        ["sh", "-c", 'until [ -e "$0/ready0" ] && [ -e "$0/ready1" ]; do sleep 0.05; done', root], timeout=20
    )
    job.send_signal(10)
    assert job.wait(20) == 0
    assert (root / "saved").read_text() == "saved\nsaved\n"
    assert (root / "requeued").read_text() == "31337\n"
    assert "vader_train.py --max-train-steps 3" in (root / "told").read_text()


def test_a_job_preempted_before_its_tasks_start_goes_back_to_the_queue(submit):
    run, root = submit
    job = run(HOLD="1")
    subprocess.run(["sh", "-c", 'until [ -e "$0/checked" ]; do sleep 0.05; done', root], timeout=60)
    job.send_signal(10)
    (root / "go").touch()
    assert job.wait(60) == 0
    assert (root / "requeued").read_text() == "31337\n" and not (root / "told").exists()


def test_outside_slurm_it_says_what_to_run():
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    done = subprocess.run(["sh", str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "submit it with sbatch" in done.stderr
