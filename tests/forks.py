"""Runs of the real entry point in forked children of one process, so that imports are paid for once.

Started as a program, it reads jobs as JSON lines and answers each with the exit codes of its processes. pytest's
own process cannot fork after a backward pass; this one never makes one itself.
"""

import importlib
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

    def run(
        self, config: Path, *flags: str, processes: int = 1, starts: int = 1, kill_after=None, kill_in_save=None,
        call: str = "", **env,
    ):  # fmt: skip
        """Exit codes by rank, and everything the processes printed.

        Args:
            starts: how often to start it, all at once; the codes are those of the first start, the second, …
            kill_after: seconds until rank 0 receives SIGKILL.
            kill_in_save: number of the call to fsync or rename at which rank 0 kills itself.
            call: ``module:function`` of this folder to run in place of the entry point, with the same arguments.
            env: environment variables of the run.
        """
        job = {"argv": [str(config), *flags], "processes": processes, "env": env, "log": str(config) + ".log"}
        job |= {"kill_after": kill_after, "kill_in_save": kill_in_save, "starts": starts, "call": call}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        logs = [Path(f"{job['log']}{start}.{rank}") for start in range(starts) for rank in range(processes)]
        return codes, "".join(log.read_text() for log in logs)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    import torch

    # What every child needs.
    import Core.cli
    import Core.evaluation.report
    import Core.generation.jobs
    import Core.rewards.pick_score
    import Core.training.setup  # noqa: F401
    import opensora.models.vae.vae  # noqa: F401

    torch.set_num_threads(1)
    port = 20000 + os.getpid() % 20000
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(run_job(job, port)), flush=True)
        port += job["starts"]


def run_job(job: dict, port: int) -> list[int]:
    if job["call"]:
        importlib.import_module(job["call"].partition(":")[0])
    ranks = [(start, rank) for start in range(job["starts"]) for rank in range(job["processes"])]
    children = [fork(job, start, rank, port + start) for start, rank in ranks]
    if job["kill_after"] is not None:
        time.sleep(job["kill_after"])
        os.kill(children[0], signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def fork(job: dict, start: int, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    signal.alarm(TIME_LIMIT)
    log = os.open(f"{job['log']}{start}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # What torchrun tells its workers. accelerate would start threads for all cores in each process.
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **job["env"]}
    if job["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if rank == 0 and job["kill_in_save"] is not None:
        kill_at_call(job["kill_in_save"])
    if os.environ.get("DIVERGE_ON_RANK") == str(rank):
        corrupt_the_optimizer()
    if os.environ.get("KILLED_RANK") == str(rank):
        kill_in_backward(int(os.environ["KILLED_IN_BACKWARD"]))
    if os.environ.get("IN_FLOAT64"):
        compute_in_float64()
    if fault := os.environ.get("FAULT"):
        fail_in_last_save(*fault.split("@"))
    if os.environ.get("IMPATIENT"):
        refuse_at_once()
    code = 70
    try:
        from Core.cli import main

        code = call(job["call"], job["argv"]) if job["call"] else main(job["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(code)


def call(name: str, argv: list[str]) -> int:
    """The exit code of ``module:function`` in this folder, given ``argv`` as they are."""
    module, _, function = name.partition(":")
    return getattr(sys.modules[module], function)(*argv) or 0


def kill_in_backward(number: int) -> None:
    """SIGKILL this process in the middle of a backward pass, the ``number``-th."""
    from Core.utils.distributed import Distributed

    backward, calls = Distributed.backward, iter(range(number - 1))

    def dying(distributed, loss):
        if next(calls, None) is None:
            loss.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))
        backward(distributed, loss)

    Distributed.backward = dying


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


def fail_in_last_save(fault: str, number: str) -> None:
    """Let the disk fail as ``failing_disk`` does, from a call of the run's last save on, and say so."""
    from disk_faults import failing_disk

    from Core.training.trainer import Trainer

    save = Trainer.save

    def faulty(trainer, *args, **kwargs):
        if not trainer.finished():
            return save(trainer, *args, **kwargs)
        with failing_disk(fault, int(number), trainer.folder) as failed:
            save(trainer, *args, **kwargs)
        print("the fault came at", failed[:1])

    Trainer.save = faulty


def refuse_at_once() -> None:
    """Do not wait for another run to leave the folder."""
    from Core.utils import folder_lock

    folder_lock.PATIENCE = 0.0


def compute_in_float64() -> None:
    """Let dtype="fp32" mean float64, in which orders of summation agree to far below any learning rate."""
    import torch

    from Core.backbones import base

    base.DTYPES["fp32"] = torch.float64


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "Open-Sora")]
    serve()
