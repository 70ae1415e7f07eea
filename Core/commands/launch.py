"""How many processes a run takes, and how they start. torchrun starts them where there are several."""

import os
import sys
from collections.abc import Mapping, Sequence

from Core.commands import torchrun
from Core.utils.errors import ConfigError

ASKED = "NUM_PROCESSES"
STARTED = "VADER_NUM_PROCESSES"  # the processes compare it with how many they are


def processes_to_start(environ: Mapping[str, str], gpus: int) -> int:
    """One for each visible GPU, or one on a CPU; as many as ``NUM_PROCESSES`` says where it is set.

    Raises:
        ConfigError: it is no number, or there are fewer GPUs.
    """
    asked = environ.get(ASKED)
    if asked is None:
        return max(gpus, 1)
    if not (asked.isascii() and asked.isdigit()) or asked.startswith("0"):
        raise ConfigError([f"{ASKED}={asked!r} is not a number of processes; give 1 or more"])
    if 0 < gpus < int(asked):
        raise ConfigError([f"{ASKED}={asked}, but the visible GPUs number {gpus}; give at most that"])
    return int(asked)


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether torchrun, accelerate or Slurm has started this process as one of several."""
    return "RANK" in environ


def launch(processes: int, words: Sequence[str]) -> None:
    """Turn this process into torchrun, which runs ``vader`` with ``words`` in so many processes."""
    cores = len(os.sched_getaffinity(0))
    # Without it torchrun gives every process one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // processes, 1)))
    os.environ[STARTED] = str(processes)
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, torchrun.__file__, str(processes), *words])
