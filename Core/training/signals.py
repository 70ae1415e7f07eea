"""Signals that end a run in order: the step is finished and saved first."""

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

logger = logging.getLogger("vader")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PASSED_ON_WITHIN = 1.0  # seconds


class StopRequest:
    """Within this context the first SIGTERM, SIGINT or SIGUSR1 is noted, and the second ends the process at once.

    SIGUSR1 is what Slurm sends ahead of a time limit when asked to. Python delivers signals to the main thread
    alone, so elsewhere nothing is installed.

    Attributes:
        signal_name: of the first signal; empty while there was none.
    """

    def __init__(self):
        self.signal_name = ""
        self._received = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return bool(self.signal_name)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if _again_by_launcher(number, self.signal_name, self._received):
                return
            os._exit(128 + number)
        self.signal_name, self._received = signal.Signals(number).name, time.monotonic()
        # Plain write: a handler may interrupt the logger while it holds its lock.
        os.write(
            2, f"\n{self.signal_name}: finishing the step and saving; once more exits at once\n".encode()
        )


def _again_by_launcher(number: int, name: str, received: float) -> bool:
    """Whether a signal to all processes of a job came to this one directly, and from its launcher as well."""
    launched, soon = "TORCHELASTIC_RUN_ID" in os.environ, time.monotonic() < received + PASSED_ON_WITHIN
    return launched and soon and signal.Signals(number).name == name
