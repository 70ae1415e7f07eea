"""The keys of the configuration that choose a reward."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from Core.rewards.hps import DEFAULT_VERSION
from Core.utils.options import option


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
        """``reward_args`` with ``hps_version`` given to the hps reward, unless they name a version themselves."""
        version = {"version": self.hps_version}
        if self.reward_fn == "hps":
            return {**version, **self.reward_args}
        parts = self.reward_fn if isinstance(self.reward_fn, Mapping) else ()
        if "hps" in parts or self.reward_fn == "aesthetic_hps":
            return {**self.reward_args, "hps": {**version, **self.reward_args.get("hps", {})}}
        return self.reward_args
