"""Validation results so far: whether the trained reward rose at the cost of something else, and when to stop."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from Core.config.schema import EarlyStop

# A monitor counts as fallen when it lost this share of what it was at first. Below that, a handful of validation
# videos says nothing.
NOTABLE = 0.05


class ValidationHistory:
    """Validation results so far, each a dict of means with its ``step``.

    Args:
        early_stop: see ``EarlyStop``: stop once the monitor has been more than ``fall`` (a
            share of its best value) below its best for ``patience`` validations in a row; with ``fall`` 0, once
            it has not improved for so long.
        lower_is_better: names of values that are better when lower.
    """

    def __init__(self, early_stop: Mapping[str, Any] | None, lower_is_better: Sequence[str] = ()):
        self.early_stop = EarlyStop(**early_stop) if early_stop else None
        self.lower_is_better = frozenset(lower_is_better)
        self.results: list[dict[str, float]] = []

    def add(self, result: dict[str, float]) -> None:
        self.results.append(result)

    @property
    def last_step(self) -> int:
        """Step of the last validation, -1 before the first."""
        return int(self.results[-1]["step"]) if self.results else -1

    def goodness(self, name: str) -> list[float]:
        """A value at each validation that has it, higher being better."""
        return [self._good(result, name) for result in self._with(name)]

    def _with(self, *names: str) -> list[dict[str, float]]:
        """Results that have these values; a validation that a full disk cut short lacks some."""
        return [r for r in self.results if not any(math.isnan(r.get(name, math.nan)) for name in names)]

    def _good(self, result: Mapping[str, float], name: str) -> float:
        return -result[name] if name in self.lower_is_better else result[name]

    def score_at(self, step: int) -> float | None:
        """The reward of the validation at ``step``, higher being better; None where there is none."""
        found = [self._good(result, "reward") for result in self._with("reward") if result["step"] == step]
        return found[-1] if found else None

    def warnings(self, monitors: Sequence[str]) -> list[str]:
        """Sentences on monitors that fell since the first validation while the trained reward rose."""
        return [warning for name in monitors if (warning := self._warning(name))]

    def _warning(self, name: str) -> str:
        whole = self._with("reward", name)
        if len(whole) < 2:
            return ""
        first, last = whole[0], whole[-1]
        rose = self._good(last, "reward") > self._good(first, "reward")
        fall = self._good(first, name) - self._good(last, name)
        if not rose or fall <= NOTABLE * abs(first[name]):
            return ""
        return (
            f"the trained reward went from {first['reward']:.4g} to {last['reward']:.4g} since step "
            f"{first['step']} while {name} went from {first[name]:.4g} to {last[name]:.4g}: the adapter may be "
            "exploiting the reward; watch the validation videos, and consider kl_weight, fewer steps or early_stop"
        )

    def stop_reason(self) -> str:
        """Why the run should stop, in words; empty to go on."""
        rule = self.early_stop
        if rule is None:
            return ""
        values = self.goodness(rule.monitor)
        if len(values) <= rule.patience:
            return ""
        best = max(values[: -rule.patience])
        threshold = best - rule.fall * abs(best)
        if any(value > threshold or (value == threshold and rule.fall) for value in values[-rule.patience :]):
            return ""
        name = rule.monitor
        below = f"more than {rule.fall:.0%} below" if rule.fall else "no better than"
        return f"{name} has been {below} its best, {abs(best):.4g}, for {rule.patience} validations"
