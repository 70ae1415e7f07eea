"""What a run will need, printed as a table."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from Core.config import Config, ConfigError, load_config
from Core.estimate.advice import Trial, first_fitting, trials
from Core.estimate.cards import CARDS, Card, device_bytes
from Core.estimate.fake_run import FakeRun, fake_run
from Core.training.trainer import total_steps
from Core.utils.files import write_whole
from Core.utils.words import counted, duration

GIB = 1 << 30


def estimate(
    argv: Sequence[str], cards: Sequence[str] = (), processes: int = 1, file: Path | None = None
) -> None:
    """Estimate a run and print it.

    Args:
        argv: ``CONFIG [flags]``.
        cards: names of those it may run on.
        processes: of the run, one per card.
        file: where to write the figures too, as JSON.

    Raises:
        ConfigError, ValueError: what is wrong with the arguments, the configuration, or sizes that are not known.
    """
    if unknown := sorted(set(cards) - set(CARDS)):
        raise ConfigError([f"--gpu must be one of {', '.join(CARDS)}, got {unknown[0]!r}"])
    if processes < 1:
        raise ConfigError([f"--processes must be at least 1, got {processes}"])
    config = load_config(argv)
    run = fake_run(config, processes, tell=progress())
    print(table(run, [CARDS[name] for name in cards]))
    report: dict[str, Any] = {"phases": figures(run), "networks": run.networks, "cards": {}}
    for line in verdicts(config, run, cards, processes, report):
        print(line)
    if file:
        write_whole(file, json.dumps(report, indent=1) + "\n")


def progress() -> Callable[[str], None]:
    """Says on the standard error stream what is being estimated, and since when."""
    started = time.monotonic()
    return lambda what: print(f"{time.monotonic() - started:5.0f} s  estimating: {what}", file=sys.stderr)


def table(run: FakeRun, cards: Sequence[Card]) -> str:
    """Phase, peak bytes, operations, and seconds on each card."""
    rows = [["phase", "peak GiB", "TFLOP", *(f"seconds, {card.name}" for card in cards)]]
    for name, phase in run.phases.items():
        seconds = (f"{card.seconds(phase.work):.2f}" for card in cards)
        rows.append([name, f"{phase.peak / GIB:.2f}", f"{phase.operations / 1e12:.2f}", *seconds])
    step = [sum(card.seconds(phase.work) for phase in run.step.values()) for card in cards]
    operations = sum(phase.operations for phase in run.step.values())
    peak = max(phase.peak for phase in run.step.values())
    rows.append(
        ["a training step", f"{peak / GIB:.2f}", f"{operations / 1e12:.2f}", *(f"{s:.2f}" for s in step)]
    )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
    return "\n".join(lines)


def figures(run: FakeRun) -> dict[str, Any]:
    return {
        name: {"peak_bytes": phase.peak, "operations": phase.operations} for name, phase in run.phases.items()
    }


def verdicts(
    config: Config, run: FakeRun, names: Sequence[str], processes: int, report: dict[str, Any]
) -> list[str]:
    """A line on each card; on all of them, without advice, where none is named."""
    first = Trial({}, run)
    needed = first.needed
    lines = [f"a card needs {needed / GIB:.1f} GiB; the most is in {run.fullest}"]
    if not names:
        fits = [card.name for card in CARDS.values() if needed <= card.memory]
        return [*lines, f"fits: {', '.join(fits) or 'no card listed'}"]
    cards = sorted((CARDS[name] for name in names), key=lambda card: -card.memory)
    found = [first]
    tried = trials(config, first, processes, progress())
    for card in cards:
        while first_fitting(found, card) is None and (trial := next(tried, None)) is not None:
            found.append(trial)
        lines.append(verdict(card, first, found, config, processes))
        fitting = first_fitting(found, card)
        report["cards"][card.name] = {
            "fits": needed <= card.memory,
            "step_seconds": first.step_seconds(card),
            "with": fitting and fitting.changes,
        }
    return lines


def verdict(card: Card, first: Trial, found: Sequence[Trial], config: Config, processes: int) -> str:
    has, fitting = f"{card.name} ({card.memory / GIB:.0f} GiB)", first_fitting(found, card)
    if fitting is first:
        return f"{has}: fits, {training_time(config, processes, first.step_seconds(card))}"
    if fitting is None:
        least = min(found, key=lambda trial: trial.needed)
        best = f"; {least} needs {least.needed / GIB:.1f} GiB, most of it in {least.run.fullest}"
        return f"{has}: does not fit{best if least.changes else ''}; use a smaller resolution or fewer num_frames"
    return (
        f"{has}: does not fit; {fitting} does, with {fitting.needed / GIB:.1f} GiB, "
        f"{training_time(config, processes, fitting.step_seconds(card))}; "
        f"unchanged, a step would take {first.step_seconds(card):.1f} s"
    )


def training_time(config: Config, processes: int, step: float) -> str:
    """Of a step of so many seconds, and of all steps without their validations."""
    videos = config.optimizer.global_batch(processes)
    steps = total_steps(config, len(config.prompt_list), videos)
    return f"a step of {counted(videos, 'video')} in {step:.1f} s, {counted(steps, 'step')} in {duration(steps * step)}"


def fits_sentence(config: Config, memory: int, processes: int = 1) -> str:
    """What the estimate says of cards with so many bytes, one for each process."""
    # Processes that share no weights differ from a single one by a buffer of the adapter's size.
    needed = device_bytes(fake_run(config, processes if config.models.shard_frozen else 1).peak)
    does = "fits" if needed <= memory else "does not fit"
    return f"predicted need {needed / GIB:.1f} GiB: {does} the card's {memory / GIB:.1f} GiB"
