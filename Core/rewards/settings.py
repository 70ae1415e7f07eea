"""The keys of the configuration that choose a reward."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from Core.rewards.hps import DEFAULT_VERSION
from Core.utils.options import option

WRAPPERS = ("relative", "hinge")


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """What is trained towards."""

    reward_fn: str | dict = option("hps", "reward: a name, path/to/file.py:Class, or {name: weight}")
    reward_args: dict = option({}, "arguments of the reward; for a mixture {name: arguments}")
    hps_version: Literal["v2.0", "v2.1"] = option(DEFAULT_VERSION, "version of the hps reward's weights")

    @property
    def parts(self) -> dict[str, Mapping]:
        """Arguments of each scorer by name."""
        if isinstance(self.reward_fn, Mapping):
            return {name: self.arguments.get(name, {}) for name in self.reward_fn}
        return {self.reward_fn: self.arguments}

    @property
    def arguments(self) -> dict:
        """``reward_args`` with ``hps_version`` given to each hps reward, unless they name a version themselves."""
        if not isinstance(self.reward_fn, Mapping):
            return _with_version(self.reward_fn, self.reward_args, self.hps_version)
        own = {name: self.reward_args.get(name, {}) for name in self.reward_fn}
        own = {name: _with_version(name, args, self.hps_version) for name, args in own.items()}
        return {**self.reward_args, **{name: args for name, args in own.items() if args != {}}}


def _with_version(name: Any, args: Any, version: str) -> Any:
    """``args`` of a reward, with ``version`` given to each hps reward in it; faulty ones are returned as they are."""
    if not isinstance(args, Mapping):
        return args
    if name == "hps":
        return {"version": version, **args}
    if name == "aesthetic_hps":
        return {**args, "hps": _with_version("hps", args.get("hps") or {}, version)}
    if name in WRAPPERS:
        inner = _with_version(args.get("reward"), args.get("reward_args") or {}, version)
        return {**args, "reward_args": inner}
    return args
