"""The terminal: one console, progress bars with rate and time left, and log lines above them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True)


@contextmanager
def status(text: str, shown: bool = True) -> Iterator[None]:
    """Shows ``text`` on standard error while the block lasts; one plain line where that is no terminal."""
    if not shown:
        yield
    elif console.is_terminal:
        with console.status(text):
            yield
    else:
        print(text, file=console.file, flush=True)
        yield


class RateColumn(ProgressColumn):
    """Seconds per item, or items per second where that reads better."""

    def render(self, task) -> Text:
        if not task.speed:
            return Text("")
        return Text(f"{task.speed:.1f}/s" if task.speed >= 1 else f"{1 / task.speed:.1f} s each")


def progress_bar(hidden: bool = False) -> Progress:
    """A progress bar on standard error: done of total, rate and time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden)


class ConsoleHandler(logging.Handler):
    """Prints log lines above what is live on a console instead of through it."""

    def __init__(self, level: int, on: Console = console):
        super().__init__(level)
        self.console = on

    def emit(self, record: logging.LogRecord) -> None:
        # A path may hold bytes that are no text.
        line = self.format(record).encode(errors="backslashreplace").decode()
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
