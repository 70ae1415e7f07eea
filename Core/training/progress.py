"""A panel in the terminal while training runs: reward, validation, where the time goes, what comes next.

Where the output is no terminal, plain lines say the same now and then.
"""

import resource
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from rich.bar import Bar
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from Core.utils import terminal
from Core.utils.words import duration

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 48
PLAIN_SECONDS = 10.0  # between two plain lines
RECENT = 20  # steps that times and the estimate of what is left are taken over


class ProgressPanel:
    """Shows a run's progress; ``with view.begin(step):`` around the training loop.

    Args:
        total: optimiser steps of the run.
        validation_steps: steps between validations.
        shown: False on every process but the main one, and for ``verbose=0``.
        console: where to draw; log messages that go there appear above the panel.
    """

    def __init__(self, total: int, validation_steps: int, shown: bool, console: Console = terminal.console):
        self.total, self.step, self.validation_steps, self.shown = total, 0, validation_steps, shown
        self.console = console
        self.rewards: list[float] = []
        self.recent: deque[Mapping[str, float]] = deque(maxlen=RECENT)
        self.metrics: Mapping[str, float] = {}
        self.validations: list[tuple[int, float]] = []
        self.activity = ""
        self.spoke = time.monotonic()
        drawn = shown and self.console.is_terminal
        self.live = Live(console=self.console, auto_refresh=False, transient=False) if drawn else None

    def begin(self, step: int) -> "ProgressPanel":
        """The view itself, for a run that has done ``step`` steps before."""
        self.step = step
        return self

    def __enter__(self) -> "ProgressPanel":
        if self.live:
            self.live.start()
            self._draw()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def update(
        self, step: int, reward: float, timings: Mapping[str, float], numbers: Mapping[str, float]
    ) -> None:
        """A step is done.

        Args:
            timings: seconds by phase.
            numbers: what else to name, such as loss, grad norm and learning rate.
        """
        self.step, self.metrics = step, numbers
        self.rewards.append(reward)
        self.recent.append(timings)
        if self.live:
            self._draw()
        elif self.shown and (step == self.total or time.monotonic() - self.spoke >= PLAIN_SECONDS):
            self.spoke = time.monotonic()
            print(self.line(), file=self.console.file, flush=True)

    def validated(self, step: int, reward: float) -> None:
        """A validation is done."""
        self.validations.append((step, reward))
        if self.live:
            self._draw()

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Shows ``activity``, something that takes long, as what comes next while the block lasts."""
        if self.shown and not self.live:
            print(f"{activity} …", file=self.console.file, flush=True)
        self.activity = f"{activity} …"
        self._draw()
        try:
            yield
        finally:
            self.activity = ""
            self._draw()

    def phases(self) -> dict[str, float]:
        """Mean seconds of each phase over the last steps."""
        names = self.recent[-1] if self.recent else {}
        return {name: sum(t.get(name, 0.0) for t in self.recent) / len(self.recent) for name in names}

    def seconds_left(self) -> float:
        return (self.total - self.step) * sum(self.phases().values())

    def line(self) -> str:
        """Everything that matters, as one line of text."""
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        seconds = sum(self.phases().values())
        parts = [f"step {self.step}/{self.total}", f"reward {self.rewards[-1]:.4g}", numbers]
        parts += [f"{seconds:.2f} s/step", f"{duration(self.seconds_left())} left"]
        return ", ".join(part for part in parts if part)

    def panel(self) -> Panel:
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column()
        rows.add_row("reward", self._reward_text())
        if self.validations:
            rows.add_row("validation", self._validation_text())
        rows.add_row("next", self._next_text())
        rows.add_row("now", Text("  ".join(f"{k} {v:.4g}" for k, v in self.metrics.items())))
        rows.add_row("memory", memory_text())
        rows.add_row("step time", self._time_table())
        done = Table.grid(padding=(0, 1))
        left = duration(self.seconds_left()) if self.recent else "–"
        bar = ProgressBar(total=self.total, completed=self.step, width=40)
        done.add_row(f"step {self.step}/{self.total}", bar, f"{left} left")
        return Panel(Group(done, Text(), rows), title="training", title_align="left", border_style="dim")

    def _reward_text(self) -> Text:
        if not self.rewards:
            return Text("–")
        return Text.assemble((sparkline(self.rewards), "cyan"), f"  {self.rewards[-1]:.4g}")

    def _validation_text(self) -> Text:
        values = [value for _, value in self.validations]
        change = values[-1] - values[0]
        style = "green" if change > 0 else "red" if change < 0 else ""
        since = f"  {change:+.4g} since step {self.validations[0][0]}" if len(values) > 1 else ""
        return Text.assemble((sparkline(values), "magenta"), f"  {values[-1]:.4g}", (since, style))

    def _next_text(self) -> str:
        if self.activity:
            return self.activity
        ahead = min(self.total, (self.step // self.validation_steps + 1) * self.validation_steps)
        if self.step >= self.total:
            return "finished"
        seconds = (ahead - self.step) * sum(self.phases().values())
        return f"validation at step {ahead}, in {duration(seconds)}"

    def _time_table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        phases = self.phases()
        longest = max(phases.values(), default=0.0)
        for name, seconds in phases.items():
            bar = Bar(size=longest or 1.0, begin=0, end=seconds, width=24, color="cyan")
            table.add_row(name.replace("_", " "), bar, f"{seconds:.3f} s")
        return table

    def _draw(self) -> None:
        if self.live:
            self.live.update(self.panel(), refresh=True)


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """At least one value as a row of at most ``width`` blocks, averaged where there are more; NaN is a gap."""
    size = -(-len(values) // width)
    bins = [values[start : start + size] for start in range(0, len(values), size)]
    means = [sum(part) / len(part) for part in bins]
    finite = [mean for mean in means if abs(mean) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return "".join(_block(mean, low, high) for mean in means)


def _block(value: float, low: float, high: float) -> str:
    if not abs(value) < float("inf"):
        return " "
    if high == low:
        return BLOCKS[3]
    return BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))]


def memory_text() -> str:
    """Peak memory: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        return f"{peak / 1e9:.1f} of {total / 1e9:.0f} GB on the GPU at most"
    # Linux counts in kB.
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB at most"
