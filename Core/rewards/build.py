"""A scorer or a mixture from a configuration: checked, its weights listed and fetched, built.

``reward_fn`` is a registered name, "path/to/file.py:Class", or {name: weight} for a mixture; ``reward_args`` are the
arguments of the scorer, for a mixture {name: {argument: value}}.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from Core.modules.quantization import Nf4Linear
from Core.modules.sharding import shard
from Core.rewards.base import Reward, thaw
from Core.rewards.mixture import Mixture, mixture_errors
from Core.rewards.qwen2_vl import Qwen2VL
from Core.rewards.registry import construct, named_errors, reading, resolve_reward
from Core.rewards.user_files import blamed
from Core.utils.hub import Weight, prefetch

RewardFn = str | Mapping[str, float]
RewardArgs = Mapping[str, Any] | None


def check_reward_config(reward_fn: RewardFn, reward_args: Any = None) -> list[str]:
    """All that is wrong with a reward configuration, one sentence each, without loading any weights."""
    if not isinstance(reward_args or {}, Mapping):
        return [f"the arguments of reward {reward_fn!r} must be a dict, got {reward_args!r}"]
    args = dict(reward_args or {})
    if isinstance(reward_fn, Mapping):
        return mixture_errors(reward_fn, args)
    try:
        return named_errors(resolve_reward(reward_fn), args)
    except ValueError as error:
        return [str(error)]


def required_weights(reward_fn: RewardFn, reward_args: RewardArgs = None) -> list[Weight]:
    """All weights that ``build_reward(reward_fn, reward_args)`` loads."""
    return [
        replace(weight, named_by=f"argument {key!r} of reward {name!r}")
        for name, own in _parts(reward_fn, reward_args).items()
        for key, weight in resolve_reward(name).required_weights(own).items()
    ]


def prompt_errors(reward_fn: RewardFn, reward_args: RewardArgs, prompts: Sequence[str]) -> list[str]:
    """Sentences on prompts the reward cannot score, before a network is loaded.

    Raises:
        FileNotFoundError: a file that tells (a list of classes) cannot be had.
    """
    errors = []
    for name, own in _parts(reward_fn, reward_args).items():
        cls = resolve_reward(name)
        with blamed(cls.origin, "on the prompts"), reading(name, cls, own):
            errors += cls.prompt_errors(own, prompts)
    return errors


def frames_needed(reward_fn: RewardFn, reward_args: RewardArgs = None) -> tuple[str, int]:
    """The scorer of a valid configuration that needs the most frames of a video, and how many."""
    parts = _parts(reward_fn, reward_args).items()
    return max(
        ((name, resolve_reward(name).frames_needed(own)) for name, own in parts), key=lambda part: part[1]
    )


def parts_without_gradient(reward_fn: RewardFn, reward_args: RewardArgs = None) -> list[str]:
    """The scorers of a valid configuration that say of themselves that they have no gradient."""
    parts = _parts(reward_fn, reward_args)
    return [name for name, own in parts.items() if not resolve_reward(name).has_gradient(own)]


def _parts(reward_fn: RewardFn, reward_args: RewardArgs) -> dict[str, Mapping[str, Any]]:
    """The scorers of a valid configuration by name, each with its own arguments."""
    args = dict(reward_args or {})
    if isinstance(reward_fn, Mapping):
        return {name: args.get(name, {}) for name in reward_fn}
    return {reward_fn: args}


def build_reward(
    reward_fn: RewardFn,
    reward_args: RewardArgs = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    mesh: Any = None,
) -> Reward:
    """Build a scorer or a weighted mixture.

    Args:
        mesh: processes that language models are split over; None leaves them whole.

    Raises:
        ValueError: every mistake of the configuration at once.
        FileNotFoundError: every missing weight at once.
    """
    if errors := check_reward_config(reward_fn, reward_args):
        raise ValueError("; ".join(errors))
    prefetch(required_weights(reward_fn, reward_args))
    parts = {name: construct(name, args) for name, args in _parts(reward_fn, reward_args).items()}
    reward = Mixture(parts, reward_fn) if isinstance(reward_fn, Mapping) else parts[reward_fn]
    if mesh is not None:
        _split(reward, mesh)
    return reward.place(device).cast(dtype)


def _split(reward: Reward, mesh: Any) -> None:
    """Split the language models of ``reward`` over processes, but for those on a device of their own or in 4 bits."""
    scorers = [part for part in reward.modules() if isinstance(part, Reward)]
    placed = {module for scorer in scorers if scorer.placement is not None for module in scorer.modules()}
    for network in [module for module in reward.modules() if isinstance(module, Qwen2VL)]:
        packed = any(isinstance(module, Nf4Linear) for module in network.modules())
        if network not in placed and not packed:
            shard(thaw(network), network.parts, mesh)
