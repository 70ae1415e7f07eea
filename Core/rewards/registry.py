"""Scorers by name, and building one (or a mixture) from a configuration."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from Core.rewards.base import Reward
from Core.utils.hub import Weight, prefetch

# Name → "module:class", imported when asked for. A new scorer is one file and one line here.
REGISTRY: dict[str, str | type[Reward]] = {
    "aesthetic": "Core.rewards.aesthetic:Aesthetic",
    "hps": "Core.rewards.hps:HPS",
    "aesthetic_hps": "Core.rewards.mixture:AestheticHPS",
    "pick_score": "Core.rewards.pick_score:PickScore",
    "clip_score": "Core.rewards.clip_score:ClipScore",
    "actpred": "Core.rewards.actpred:ActionPrediction",
    "compression": "Core.rewards.compression:Compression",
    "incompressibility": "Core.rewards.compression:Incompressibility",
    "weather": "Core.rewards.weather:Weather",
    "object_detection": "Core.rewards.object_detection:ObjectDetection",
    "vjepa": "Core.rewards.vjepa:VJepa",
    "motion": "Core.rewards.guards:Motion",
    "sharpness": "Core.rewards.guards:Sharpness",
    "saturation": "Core.rewards.guards:Saturation",
}


def register(name: str, reward: str | type[Reward]) -> None:
    """Add a scorer at run time: a class, or "module:class". A name in use is refused."""
    if name in REGISTRY:
        raise ValueError(f"a reward named {name!r} exists already; choose another name")
    REGISTRY[name] = reward


def resolve_reward(name: str) -> type[Reward]:
    """The class behind a registered name or behind "path/to/file.py:Class"; ValueError says what is wrong."""
    if not isinstance(name, str):
        raise ValueError(f"a reward is named by a string, got {name!r}")
    target = REGISTRY.get(name)
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)
    if target is not None:
        return target
    if ".py:" in name:
        return _class_from_file(name)
    near = difflib.get_close_matches(name, REGISTRY, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown reward {name!r}: {hint}choose one of {', '.join(sorted(REGISTRY))}, "
        'or your own as "path/to/my_reward.py:MyReward"'
    )


def _class_from_file(spec: str) -> type[Reward]:
    """Import `Class` from "path/to/file.py:Class"."""
    path, _, attribute = spec.rpartition(":")
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"reward {spec!r}: there is no file {path!r}")
    found = getattr(_import_file(file), attribute, None)
    if not (isinstance(found, type) and issubclass(found, Reward)):
        raise ValueError(
            f"reward {spec!r}: {path!r} has no class {attribute!r} derived from Core.rewards.Reward"
        )
    return found


def _import_file(file: Path) -> ModuleType:
    """The module in a Python file outside the package, imported once."""
    name = f"reward_file_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec: Any = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except Exception as error:  # the file is the user's program, so anything may come out of it
            del sys.modules[name]
            raise ValueError(f"reward file {str(file)!r} fails on import: {error!r}") from error
    return sys.modules[name]


def check_reward_config(
    reward_fn: str | Mapping[str, float], reward_args: Mapping[str, Any] | None = None
) -> list[str]:
    """All that is wrong with a reward configuration, one sentence each, without loading any weights."""
    from Core.rewards.mixture import mixture_errors

    args = dict(reward_args or {})
    if isinstance(reward_fn, Mapping):
        return mixture_errors(reward_fn, args)
    try:
        return resolve_reward(reward_fn).config_errors(args)
    except ValueError as error:
        return [str(error)]


def required_weights(
    reward_fn: str | Mapping[str, float], reward_args: Mapping[str, Any] | None = None
) -> list[Weight]:
    """All weights that `build_reward(reward_fn, reward_args)` loads."""
    parts = _parts(reward_fn, reward_args)
    return [w for name, own in parts.items() for w in resolve_reward(name).required_weights(own).values()]


def prompt_errors(
    reward_fn: str | Mapping[str, float], reward_args: Mapping[str, Any] | None, prompts: Sequence[str]
) -> list[str]:
    """Sentences on prompts the reward cannot score, before a network is loaded.

    Raises FileNotFoundError if a file that tells (a list of classes) cannot be had.
    """
    parts = _parts(reward_fn, reward_args)
    return [e for name, own in parts.items() for e in resolve_reward(name).prompt_errors(own, prompts)]


def _parts(
    reward_fn: str | Mapping[str, float], reward_args: Mapping[str, Any] | None
) -> dict[str, Mapping[str, Any]]:
    """The scorers of a valid configuration by name, each with its own arguments."""
    args = dict(reward_args or {})
    if isinstance(reward_fn, Mapping):
        return {name: args.get(name, {}) for name in reward_fn}
    return {reward_fn: args}


def build_reward(
    reward_fn: str | Mapping[str, float],
    reward_args: Mapping[str, Any] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Reward:
    """Build a scorer or a weighted mixture.

    reward_fn: a registered name, "path/to/file.py:Class", or {name: weight}. reward_args: arguments of the
    scorer; for a mixture {name: {argument: value}}. Raises ValueError with every mistake of the
    configuration at once, FileNotFoundError with every missing weight at once.
    """
    from Core.rewards.mixture import Mixture

    args = dict(reward_args or {})
    if errors := check_reward_config(reward_fn, args):
        raise ValueError("; ".join(errors))
    prefetch(required_weights(reward_fn, args))
    if isinstance(reward_fn, Mapping):
        reward = Mixture({name: construct(name, args.get(name, {})) for name in reward_fn}, reward_fn)
    else:
        reward = construct(reward_fn, args)
    return reward.to(device).cast(dtype)


def construct(name: str, args: Mapping[str, Any]) -> Reward:
    """Instantiate a scorer; `slice_size`, which every scorer understands, is set on the instance."""
    reward = resolve_reward(name)(**{key: value for key, value in args.items() if key != "slice_size"})
    reward.slice_size = args.get("slice_size", reward.slice_size)
    return reward
