"""The live panel: what it shows on a terminal, what it prints without one."""

import io
import logging

import pytest
from rich.console import Console

from Core.training.progress import BLOCKS, ProgressPanel, sparkline
from Core.utils.terminal import ConsoleHandler

TIMINGS = {
    "prefix": 0.8,
    "gradient_steps": 0.4,
    "decode": 0.3,
    "reward": 0.1,
    "backward": 0.3,
    "optimizer": 0.1,
}
NUMBERS = {"loss": 0.25, "grad norm": 0.0125, "lr": 2e-4}


def view_on(terminal: bool, shown: bool = True):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    return ProgressPanel(100, 10, shown, console), out


def advance(view, steps):
    for step in range(1, steps + 1):
        view.update(step, step / 10, TIMINGS, NUMBERS)


def test_the_panel_shows_progress_times_and_what_comes_next():
    view, out = view_on(terminal=True)
    with view.begin(0):
        view.validated(0, 0.5)
        advance(view, 24)
        view.validated(20, 1.25)
    shown = out.getvalue()
    for words in (
        "step 24/100",
        "2 min 32 s left",
        "validation at step 30, in 12 s",
        "+0.75 since step 0",
    ):
        assert words in shown
    for phase, seconds in TIMINGS.items():
        assert phase.replace("_", " ") in shown and f"{seconds:.3f} s" in shown
    assert "GB" in shown and "loss 0.25" in shown


def test_messages_stand_above_the_panel():
    view, out = view_on(terminal=True)
    log, handler = logging.getLogger("vader"), ConsoleHandler(logging.INFO, view.console)
    log.addHandler(handler)
    try:
        with view.begin(0):
            advance(view, 1)
            log.warning("watch out")
            advance(view, 2)
    finally:
        log.removeHandler(handler)
    before, after = out.getvalue().split("watch out")
    assert "step 1/100" in before and "step 2/100" in after


def test_plain_lines_without_a_terminal():
    view, out = view_on(terminal=False)
    with view.begin(98):
        view.spoke -= 60
        view.update(99, 9.9, TIMINGS, NUMBERS)
        view.update(100, 10.0, TIMINGS, NUMBERS)
    first, last = out.getvalue().splitlines()
    assert first == ("step 99/100, reward 9.9, loss 0.25, grad norm 0.0125, lr 0.0002, 2.00 s/step, 2 s left")
    assert last.startswith("step 100/100") and "\x1b" not in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_other_processes_stay_silent(terminal):
    view, out = view_on(terminal, shown=False)
    with view.begin(0):
        advance(view, 100)
    assert out.getvalue() == ""


def test_sparklines():
    assert sparkline([0, 1, 2]) == BLOCKS[0] + BLOCKS[4] + BLOCKS[7]
    assert sparkline([3, 3]) == BLOCKS[3] * 2
    assert sparkline([0, float("nan"), 1]) == BLOCKS[0] + " " + BLOCKS[7]
    assert len(sparkline(range(1000))) <= 48
