"""Rewards around another one, which they take by its name and arguments."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from Core.rewards.base import SHARED_ARGUMENTS, Reward, RewardInfo, RewardOutput, shared_of
from Core.rewards.registry import construct, named_errors, resolve_reward
from Core.utils.hub import Weight
from Core.utils.options import Bounds


class Wrapper(Reward):
    """Holds the reward inside as ``inner``, and answers for it before it is built."""

    def __init__(self, *, reward: str, reward_args: dict | None = None):
        super().__init__()
        self.inner = construct(reward, reward_args or {})

    @property
    def higher_is_better(self) -> bool:
        return self.inner.higher_is_better

    def cast(self, dtype: torch.dtype) -> "Wrapper":
        self.inner.cast(dtype)
        return self

    def place(self, device: str | torch.device) -> "Wrapper":
        self.inner.place(device)
        return self

    @classmethod
    def scorers(cls, args: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        if args is None or cls.config_errors(args):
            return ()
        return resolve_reward(args["reward"]).scorers(own_arguments(args))

    @classmethod
    def required_weights(cls, args: Mapping[str, Any]) -> dict[str, Weight]:
        if not args:  # of no reward in particular, as a listing of all rewards asks
            return {}
        inner = resolve_reward(args["reward"]).required_weights(own_arguments(args))
        return {f"reward_args.{key}": weight for key, weight in inner.items()}

    @classmethod
    def passed_on(cls, args: Mapping[str, Any]) -> Mapping[str, Any]:
        own = {key: value for key, value in args.items() if key not in SHARED_ARGUMENTS}
        return {**own, "reward_args": shared_of(args) | own_arguments(args)}

    @classmethod
    def config_errors(cls, args: Mapping[str, Any]) -> list[str]:
        if errors := cls.own_errors(args):
            return errors
        try:
            return named_errors(resolve_reward(args["reward"]), own_arguments(args))
        except ValueError as error:
            return [f"reward_args of {cls.info.name!r}: reward: {error}"]

    @classmethod
    def has_gradient(cls, args: Mapping[str, Any]) -> bool:
        return resolve_reward(args["reward"]).has_gradient(own_arguments(args))

    @classmethod
    def frames_needed(cls, args: Mapping[str, Any]) -> int:
        return resolve_reward(args["reward"]).frames_needed(own_arguments(args))

    @classmethod
    def prompt_errors(cls, args: Mapping[str, Any], prompts: Sequence[str]) -> list[str]:
        return resolve_reward(args["reward"]).prompt_errors(own_arguments(args), prompts)


Words = Annotated[str, Bounds(empty=True)]


def own_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the reward inside."""
    return dict(args.get("reward_args") or {})


class Relative(Wrapper):
    """Score and loss with ``positive`` words before the prompt, minus those with ``negative`` words.

    What the reward inside favours regardless of the prompt cancels out (SRPO's semantic-relative reward). That reward
    must read the prompt, as ``hps``, ``pick_score`` and ``clip_score`` do. It runs forward twice.

    Args:
        reward: name of the reward inside, or path/to/file.py:Class.
        reward_args: its arguments.
        positive: words put before each prompt, such as "Realistic photo.".
        negative: the same for what is subtracted, such as "CG render.".
    """

    info = RewardInfo(
        name="relative",
        summary="a text-image reward with wanted words in the prompt, minus the same with unwanted ones",
        range="differences of the reward inside",
        paper="Shen et al. 2025, arXiv:2509.06942",
    )

    def __init__(self, *, reward: str, positive: Words, negative: Words, reward_args: dict | None = None):
        super().__init__(reward=reward, reward_args=reward_args)
        self.positive, self.negative = positive, negative

    @classmethod
    def config_errors(cls, args: Mapping[str, Any]) -> list[str]:
        errors = super().config_errors(args)
        if not errors and args["positive"].split() == args["negative"].split():
            errors = [f"reward_args of 'relative': positive and negative are both {args['positive']!r}"]
        return errors

    @classmethod
    def prompt_errors(cls, args: Mapping[str, Any], prompts: Sequence[str]) -> list[str]:
        texts = [text for key in ("positive", "negative") for text in with_words(args[key], prompts)]
        return super().prompt_errors(args, texts)

    def evaluate(self, frames: Tensor, prompts: list[str]) -> RewardOutput:
        wanted = self.inner.judge(frames, with_words(self.positive, prompts))
        unwanted = self.inner.judge(frames, with_words(self.negative, prompts))
        score = wanted.score - unwanted.score
        if not score.any():
            raise ValueError(
                f"reward 'relative' is 0 for every video: {type(self.inner).info.name!r} does not tell "
                f"{self.positive!r} from {self.negative!r}; choose a reward that reads the prompt, or other words"
            )
        return RewardOutput(score, wanted.loss - unwanted.loss, {**wanted.parts, "relative": score.detach()})


def with_words(words: str, prompts: Sequence[str]) -> list[str]:
    """Each prompt after the words."""
    return [f"{words.strip()} {prompt}".strip() for prompt in prompts]


class Hinge(Wrapper):
    """Score of the reward inside; loss relu(target − score), or relu(score − target) where lower is better.

    A video that has reached the target is left alone, so a guard cannot be driven to an extreme.

    Args:
        reward: name of the reward inside, or path/to/file.py:Class.
        reward_args: its arguments.
        target: score that is enough, in the unit of the reward inside; so is the loss.
    """

    info = RewardInfo(
        name="hinge",
        summary="another reward, but only up to a target",
        range="that of the reward inside",
    )

    def __init__(self, *, reward: str, target: float, reward_args: dict | None = None):
        super().__init__(reward=reward, reward_args=reward_args)
        self.target = target

    def evaluate(self, frames: Tensor, prompts: list[str]) -> RewardOutput:
        inner = self.inner.judge(frames, prompts)
        missing = self.target - inner.score
        loss = F.relu(missing if self.higher_is_better else -missing)
        return RewardOutput(inner.score, loss, inner.parts)
