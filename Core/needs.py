"""The weights that models, rewards and configs need: which, how large, under which key."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from Core.backbones import BACKBONES, FamilySettings
from Core.config import load_config
from Core.rewards import Weight, resolve_reward
from Core.utils.hub import human_size


@dataclass(frozen=True)
class Need:
    """Weights and the config key that names them, such as ("model", "from_pretrained") or ("reward_args", …)."""

    owner: str
    key: tuple[str, ...]
    weight: Weight


def model_needs(family: str, settings: FamilySettings | None = None) -> list[Need]:
    """Weights of a model family: the published ones, or those that settings name."""
    cls = BACKBONES.resolve(family)
    weights = cls.weights_of(settings) if settings else cls.weights
    return [Need(family, tuple(key.split(".")), weight) for key, weight in weights.items()]


def reward_needs(
    name: str, args: Mapping[str, Any], owner: str = "", place: tuple[str, ...] = ("reward_args",)
) -> list[Need]:
    """Weights of one scorer, whose arguments are at `place`: one level deeper in a mixture or for a monitor."""
    required = resolve_reward(name).required_weights(args)
    owner = owner or name
    return [Need(owner, (*place, *key.split(".")), weight) for key, weight in required.items()]


def config_needs(path: str) -> list[Need]:
    """Weights of everything a config file names. Raises ValueError listing the file's errors."""
    config = load_config([path])
    needs = model_needs(config.models.backbone, config.family)
    if not config.run.is_vader_training:
        return needs
    mixture = isinstance(config.reward.reward_fn, Mapping)
    for name, args in config.reward.parts.items():
        place = ("reward_args", name) if mixture else ("reward_args",)
        needs += reward_needs(name, args, "mixture" if mixture else "", place)
    for name in config.validation.monitors:
        given = config.validation.monitor_args.get(name, {})
        needs += reward_needs(name, given, "monitors", ("monitor_args", name))
    return needs


def listing(needs: list[Need]) -> str:
    """Table of the weights: size, source, licence and users."""
    lines, total = [], 0
    for weight in dict.fromkeys(need.weight for need in needs):
        users = ", ".join(dict.fromkeys(need.owner for need in needs if need.weight == weight))
        size = human_size(weight.size) if weight.size else "size unknown"
        name = (
            weight.name if weight.source.startswith("https://") else f"{weight.source} {weight.file}".strip()
        )
        remark = "your own copy" if weight.is_local else f"licence: {weight.licence or 'see its page'}"
        lines.append(f"{size:>12}  {name}  ({remark}; for {users})")
        total += 0 if weight.is_local else weight.size
    return "\n".join([*lines, f"{human_size(total):>12}  to download at most"])


def config_lines(needs: list[Need], paths: dict[Weight, Path]) -> str:
    """Lines that point at the copies, for a config with a `_base_` whose entries they update."""
    lines = []
    for owner in dict.fromkeys(need.owner for need in needs):
        lines.append(f"# {owner}")
        entries: dict[str, Any] = {}
        for need in (need for need in needs if need.owner == owner):
            *outer, last = need.key
            place = entries
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = str(paths[need.weight])
        lines += [f"{entry} = {values!r}" for entry, values in entries.items()]
    return "\n".join(lines)
