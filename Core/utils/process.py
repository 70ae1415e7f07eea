"""How a process of a run ends when its launcher or its user ends it. Imports nothing that takes time."""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h
INTERRUPTED = "interrupted; the same command starts again, or continues from what is saved"


def end_with_launcher() -> None:
    """Have the kernel kill this process when the launcher that started it is gone; nothing without a launcher.

    Otherwise workers would train on beside the command that is repeated. What they saved is whole. A start without
    torchrun or accelerate stays as it is: its shell may exit.
    """
    parent = os.getppid()
    if not _has_launcher(parent):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def _has_launcher(parent: int) -> bool:
    """torchrun tells its workers; accelerate, which starts a single process by itself, shows in its command."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(Path(word).name in ("accelerate", "accelerate-launch") for word in command) or (
        "accelerate.commands.launch" in command
    )


@contextmanager
def quiet_interrupt() -> Iterator[None]:
    """Within this context Ctrl-C ends the process with one sentence and status 130: for imports, which take seconds."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # ignored, as in a background job, or somebody else's
        return
    signal.signal(signal.SIGINT, _exit_interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit_interrupted(number: int, frame: FrameType | None) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"\n{INTERRUPTED}\n".encode())
    os._exit(128 + number)
