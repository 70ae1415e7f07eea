"""torchrun for the processes of one run: ``torchrun.py PROCESSES WORD …`` runs ``vader`` with these words in each.

A program of its own, so that no memory of a GPU that ``vader`` has looked at stays taken while the processes run.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

PACKAGE = Path(__file__).resolve().parents[1]
# The others are passed on below: torchrun kills the processes 30 seconds after a signal that it handles, in the middle
# of a step or a save.
LEFT_TO_TORCHRUN = "SIGQUIT"
passed_on: list[int] = []


def main(argv: Sequence[str]) -> int:
    """0 when all processes ended well, else the exit code of one that did not; 4 where signals ended them."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from Core.training.signals import SIGNALS

    processes, *words = argv
    os.environ["PET_SIGNALS_TO_HANDLE"] = LEFT_TO_TORCHRUN
    for number in SIGNALS:
        signal.signal(number, pass_on)
    try:
        torchrun(["--standalone", "--nproc-per-node", processes, str(PACKAGE / "__main__.py"), *words])
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if passed_on and set(codes) <= {-passed_on[0], -signal.SIGTERM}:
            return 128 + passed_on[0]  # it came before they knew what to do
        return explained(codes)
    except SignalException as error:
        return 128 + error.sigval
    return 0


def pass_on(number: int, frame: FrameType | None) -> None:
    """Give a signal to the processes of the run, which know what to do; end where there are none yet."""
    workers = psutil.Process().children()
    if not workers:
        sys.exit(128 + number)
    passed_on.append(number)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(number)


def explained(codes: Sequence[int]) -> int:
    """One exit code for those of the processes that failed.

    A process that ended by itself has said why. One that a signal ended, such as the kernel's when memory is short,
    could not, nor could those that waited for it on a GPU until torchrun ended them by SIGTERM.
    """
    from Core.utils.exit_codes import answer

    for code in codes:
        if code > 0:
            return code
    number = -max(codes, key=lambda code: code != -signal.SIGTERM)
    names = {known.value: known.name for known in signal.Signals}  # most real-time signals have none
    ended_by = names.get(number, f"signal {number}")
    sentence = (
        f"a process of the run was ended by {ended_by}; torchrun names it above, what it or its machine wrote last may "
        "say why, and the same command continues from what is saved"
    )
    return answer(4, [sentence])


if __name__ == "__main__":
    # The folder of Core in place of this one, which is absent with PYTHONSAFEPATH.
    own = Path(__file__).resolve().parent
    sys.path[:] = [str(PACKAGE.parent), *(path for path in sys.path if Path(path).resolve() != own)]
    sys.exit(main(sys.argv[1:]))
