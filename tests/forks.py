"""Runs of the real entry point in forked children of one process, so that imports are paid for once.

Started as a program, it reads jobs as JSON lines and answers each with the exit codes of its processes. pytest's
own process cannot fork after a backward pass; this one never makes one itself.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TIME_LIMIT = 240  # seconds; a run that hangs ends with SIGALRM


class ForkServer:
    """The program, and ``run`` to give it a job."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, config: Path, *flags: str, processes: int = 1, kill_after=None, kill_in_save=None, **env):
        """Exit codes by rank, and everything the processes printed.

        Args:
            kill_after: seconds until rank 0 receives SIGKILL.
            kill_in_save: number of the call to fsync or rename at which rank 0 kills itself.
            env: environment variables of the run.
        """
        job = {"argv": [str(config), *flags], "processes": processes, "env": env, "log": str(config) + ".log"}
        job |= {"kill_after": kill_after, "kill_in_save": kill_in_save}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        return codes, "".join(Path(f"{job['log']}{rank}").read_text() for rank in range(processes))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    import torch

    import Core.cli  # noqa: F401 (what every child needs)

    torch.set_num_threads(1)
    port = 20000 + os.getpid() % 20000
    for number, line in enumerate(sys.stdin):
        print(json.dumps(run_job(json.loads(line), port + number)), flush=True)


def run_job(job: dict, port: int) -> list[int]:
    children = [fork(job, rank, port) for rank in range(job["processes"])]
    if job["kill_after"] is not None:
        time.sleep(job["kill_after"])
        os.kill(children[0], signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def fork(job: dict, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    signal.alarm(TIME_LIMIT)
    log = os.open(f"{job['log']}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # What torchrun tells its workers.
    os.environ |= {"ACCELERATE_USE_CPU": "true", **job["env"]}
    if job["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if rank == 0 and job["kill_in_save"] is not None:
        kill_at_call(job["kill_in_save"])
    if os.environ.get("DIVERGE_ON_RANK") == str(rank):
        corrupt_the_optimizer()
    if os.environ.get("IN_FLOAT64"):
        compute_in_float64()
    code = 70
    try:
        from Core.cli import main

        code = main(job["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(code)


def kill_at_call(number: int) -> None:
    """SIGKILL this process at a call to fsync or rename: in the middle of a save."""
    calls = iter(range(number))

    def counted(function):
        def call(*args, **kwargs):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync, os.rename = counted(os.fsync), counted(os.rename)


def corrupt_the_optimizer() -> None:
    """Let this process's memory flip a bit, as it were, in each step."""
    from Core.training.trainer import Trainer

    step = Trainer.train_step

    def faulty(trainer):
        metrics = step(trainer)
        trainer.parameters[0].data[0, 0] += 1e-6
        return metrics

    Trainer.train_step = faulty


def compute_in_float64() -> None:
    """Let dtype="fp32" mean float64, in which orders of summation agree to far below any learning rate."""
    import torch

    from Core.backbones import base

    base.DTYPES["fp32"] = torch.float64


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "Open-Sora")]
    serve()
