"""The tests that need a GPU, run by pytest, with the numbers that they record."""

import os
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu.part import Report

TESTS = Path(__file__).resolve().parents[2] / "tests" / "test_cuda.py"
ON_CPU = "VADER_CUDA_TESTS_ON_CPU"  # tests/test_cuda.py then runs on a CPU what can run there


class Recorder:
    """A plugin of pytest that reports each test as soon as it ends."""

    def __init__(self, report: Report):
        self.report, self.tests = report, []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Of a test that runs, its call counts; of others, what kept it from running.
        if report.when == "call" or report.outcome != "passed":
            self.tests.append(outcome(report))
            self.report.add(tests=self.tests)


def outcome(report: pytest.TestReport) -> dict[str, Any]:
    """Name, outcome, seconds, recorded numbers, and the last line that explains it unless it passed."""
    told = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    lines = [line for line in told.splitlines() if line.startswith("E ")] or told.splitlines()[-1:]
    return {
        "name": report.nodeid.partition("::")[2],
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "recorded": dict(report.user_properties),
        "message": lines[0].removeprefix("E").strip() if lines else "",
    }


def run(report: Report, small: bool, *words: str) -> None:
    """Outcomes of the tests whose names hold one of ``words``.

    Raises:
        RuntimeError: some failed, or pytest found none.
    """
    if small:
        os.environ[ON_CPU] = "1"
    argv = ["-p", "no:cacheprovider", "--tb=short", str(TESTS), "-k", " or ".join(words)]
    if code := pytest.main(argv, plugins=[Recorder(report)]):
        raise RuntimeError(f"pytest ended with status {int(code)}")
