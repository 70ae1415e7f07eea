"""The cheapest settings with which a run fits a card, predicted one after the other."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from Core.config import Config, ConfigError
from Core.config.load import build_config
from Core.estimate.cards import Card, device_bytes
from Core.estimate.fake_run import FakeRun, fake_run
from Core.estimate.memory_savers import TEXT_SAVER, needed_beside, unused_savers


@dataclass(frozen=True)
class Trial:
    """Settings on top of the configuration's, and the run that they make."""

    changes: dict[str, Any]
    run: FakeRun

    @property
    def needed(self) -> int:
        """Bytes of a card."""
        return device_bytes(self.run.peak)

    def step_seconds(self, card: Card) -> float:
        return sum(card.seconds(phase.work) for phase in self.run.step.values())

    def __str__(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.changes.items())


def trials(config: Config, first: Trial, processes: int, tell: Callable[[str], None]) -> Iterator[Trial]:
    """Each setting that saves memory on top of those before; what lowers no peak, or is refused, is left out.

    Args:
        first: the configuration as it is.
    """
    best, savers = first, unused_savers(config)
    of_text = [TEXT_SAVER] if config.models.text_encoding != "cpu" else []
    while left := of_text if best.run.fullest == "text" else savers:
        key, value = left.pop(0)
        changes = {**best.changes, key: value}
        changes |= needed_beside(key, config.flat() | changes)
        tell(f"{key}={value!r}")
        # A batch that is cut is made up for by more backward passes: the step stays the same.
        values = config.flat() | changes
        if key == "train_batch_size":
            samples = config.optimizer.train_batch_size * config.optimizer.gradient_accumulation_steps
            values["gradient_accumulation_steps"] = changes["gradient_accumulation_steps"] = samples
        try:
            changed = build_config(values)
        except ConfigError:  # one frame for a reward of motion, say
            continue
        run = fake_run(changed, processes)
        if run.peak < best.run.peak:
            best = dataclasses.replace(best, changes=changes, run=run)
            yield best


def best_for(config: Config, memory: int, tell: Callable[[str], None]) -> Trial:
    """The cheapest settings with which the run fits a card of so many bytes, or those that need least where none do."""
    best = Trial({}, fake_run(config, tell=tell))
    tried = trials(config, best, 1, tell)
    while best.needed > memory and (trial := next(tried, None)) is not None:
        best = trial
    return best


def first_fitting(found: Sequence[Trial], card: Card) -> Trial | None:
    return next((trial for trial in found if trial.needed <= card.memory), None)
