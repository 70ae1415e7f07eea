"""Weighted sums of scorers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from Core.rewards.base import Reward, RewardInfo, RewardOutput, resolve_reward


class Mixture(Reward):
    """Score and loss are weighted sums over the parts; each part is logged unweighted, under its own name.

    A part whose score is better when lower (`info.higher_is_better` False) enters the summed score
    negatively, so that a higher mixture score is always better.
    """

    info = RewardInfo(name="mixture", summary="weighted sum of rewards", range="depends on the parts")

    def __init__(self, parts: Mapping[str, Reward], weights: Mapping[str, float]):
        super().__init__()
        self.rewards = nn.ModuleList(parts.values())
        self.names = list(parts)
        self.weights = [float(weights[name]) for name in parts]

    def cast(self, dtype: torch.dtype) -> Mixture:
        for reward in self.rewards:
            reward.cast(dtype)
        return self

    def evaluate(self, frames: Tensor, prompts: list[str]) -> RewardOutput:
        outputs = [reward(frames, prompts) for reward in self.rewards]
        signs = [1 if reward.info.higher_is_better else -1 for reward in self.rewards]
        score = sum(w * sign * out.score for w, sign, out in zip(self.weights, signs, outputs, strict=True))
        loss = sum(w * out.loss for w, out in zip(self.weights, outputs, strict=True))
        parts = {key: value for out in outputs for key, value in out.parts.items()}
        return RewardOutput(score, loss, parts)


def mixture_errors(weights: Mapping[Any, Any], args: Mapping[str, Any]) -> list[str]:
    """Sentences on what is wrong with a mixture {name: weight} and its arguments {name: {…}}."""
    errors = [] if weights else ["a reward mixture needs at least one part, got an empty dict"]
    seen: dict[str, Any] = {}
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            errors.append(f"weight of reward {name!r} must be a number above 0, got {weight!r}")
        errors += _part_errors(name, args.get(name, {}), seen)
    errors += [
        f"reward_args has settings for {name!r}, no part of the mixture ({', '.join(map(str, weights))})"
        for name in args
        if name not in weights
    ]
    return errors


def _part_errors(name: Any, own: Any, seen: dict[str, Any]) -> list[str]:
    """Errors of one part; `seen` maps the scorers met so far to the names they were given by."""
    try:
        cls = resolve_reward(name)
    except ValueError as error:
        return [str(error)]
    if not isinstance(own, Mapping):
        return [f"reward_args of {name!r} in a mixture must be a dict of its arguments, got {own!r}"]
    errors = [
        f"rewards {seen[scorer]!r} and {name!r} of the mixture both hold {scorer!r}; keep one of them"
        for scorer in cls.scorers()
        if scorer in seen
    ]
    seen.update(dict.fromkeys(cls.scorers(), name))
    return errors + cls.config_errors(own)
