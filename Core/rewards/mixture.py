"""Weighted sums of scorers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from Core.rewards.base import Reward, RewardInfo, RewardOutput, shared_of
from Core.rewards.registry import construct, named_errors, resolve_reward
from Core.utils.hub import Weight
from Core.utils.options import NUMBER_LIMIT, shown


class Mixture(Reward):
    """Score and loss are weighted sums over the parts; each part is logged unweighted, under its own name.

    A part whose score is better when lower (``higher_is_better`` False) enters the summed score
    negatively, so that a higher mixture score is always better.

    Args:
        score_weights: those of the score, where they differ from those of the loss.
    """

    info = RewardInfo(name="mixture", summary="weighted sum of rewards", range="depends on the parts")

    def __init__(
        self,
        parts: Mapping[str, Reward],
        weights: Mapping[str, float],
        score_weights: Mapping[str, float] | None = None,
    ):
        super().__init__()
        self.rewards = nn.ModuleList(parts.values())
        self.weights = [float(weights[name]) for name in parts]
        self.score_weights = [float((score_weights or weights)[name]) for name in parts]

    def cast(self, dtype: torch.dtype) -> "Mixture":
        for reward in self.rewards:
            reward.cast(dtype)
        return self

    def place(self, device: str | torch.device) -> "Mixture":
        for reward in self.rewards:
            reward.place(device)
        return self

    def sample_frames(self, count: int, fps: float | None) -> Tensor:
        """The most frames that a part asks for; all parts score the same."""
        return max((reward.sample_frames(count, fps) for reward in self.rewards), key=len)

    def judge(self, frames: Tensor, prompts: list[str]) -> RewardOutput:
        """``evaluate``; each part takes the frames to where its own networks are."""
        return self.evaluate(frames, prompts)

    def evaluate(self, frames: Tensor, prompts: list[str]) -> RewardOutput:
        outputs = [reward.judge(frames, prompts) for reward in self.rewards]
        signs = [1 if reward.higher_is_better else -1 for reward in self.rewards]
        score = sum(
            w * sign * out.score for w, sign, out in zip(self.score_weights, signs, outputs, strict=True)
        )
        loss = sum(w * out.loss for w, out in zip(self.weights, outputs, strict=True))
        parts = {key: value for out in outputs for key, value in out.parts.items()}
        return RewardOutput(score, loss, parts)


class AestheticHPS(Mixture):
    """(r_a + 15·r_h) / 2 of the scores; (1.5·0.1·|r_a − 10| + |1 − r_h|) / 2 of the losses.

    Args:
        aesthetic: arguments of that scorer.
        hps: arguments of that scorer.
    """

    info = RewardInfo(
        name="aesthetic_hps",
        summary="`aesthetic` and `hps` combined with the VADER reference's weights",
        range="0 to 8",
        paper="Prabhudesai et al. 2024, arXiv:2407.08737",
    )

    def __init__(self, *, aesthetic: dict | None = None, hps: dict | None = None):
        parts = {"aesthetic": construct("aesthetic", aesthetic or {}), "hps": construct("hps", hps or {})}
        super().__init__(parts, {"aesthetic": 1.5 / 2, "hps": 1 / 2}, {"aesthetic": 1 / 2, "hps": 15 / 2})

    @classmethod
    def scorers(cls, args: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        return ("aesthetic", "hps")

    @classmethod
    def required_weights(cls, args: Mapping[str, Any]) -> dict[str, Weight]:
        return {
            f"{name}.{key}": weight
            for name in cls.scorers()
            for key, weight in resolve_reward(name).required_weights(args.get(name) or {}).items()
        }

    @classmethod
    def passed_on(cls, args: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: shared_of(args) | dict(args.get(name) or {}) for name in cls.scorers()}

    @classmethod
    def config_errors(cls, args: Mapping[str, Any]) -> list[str]:
        return cls.own_errors(args) or [
            error
            for name in cls.scorers()
            for error in resolve_reward(name).config_errors(args.get(name) or {})
        ]


def mixture_errors(weights: Mapping[Any, Any], args: Mapping[str, Any]) -> list[str]:
    """Sentences on what is wrong with a mixture {name: weight} and its arguments {name: {…}}."""
    errors = [] if weights else ["a reward mixture needs at least one part, got an empty dict"]
    seen: dict[str, Any] = {}
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= NUMBER_LIMIT:
            errors.append(
                f"weight of reward {name!r} must be a number above 0, got {shown(weight)}; at most {NUMBER_LIMIT}"
            )
        errors += _part_errors(name, args.get(name, {}), seen)
    errors += [
        f"reward_args has settings for {name!r}, no part of the mixture ({', '.join(map(str, weights))})"
        for name in args
        if name not in weights
    ]
    return errors


def _part_errors(name: Any, own: Any, seen: dict[str, Any]) -> list[str]:
    """Errors of one part; ``seen`` maps the scorers met so far to the names they were given by."""
    try:
        cls = resolve_reward(name)
    except ValueError as error:
        return [str(error)]
    if not isinstance(own, Mapping):
        return [f"reward_args of {name!r} in a mixture must be a dict of its arguments, got {own!r}"]
    scorers = cls.scorers(own)
    errors = [
        f"rewards {seen[scorer]!r} and {name!r} of the mixture both hold {scorer!r}; keep one of them"
        for scorer in scorers
        if scorer in seen
    ]
    seen.update(dict.fromkeys(scorers, name))
    return errors + named_errors(cls, own)
