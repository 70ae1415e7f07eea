"""Write Core/commands/catalogue.json from the registries and the shipped configs: write_catalogue.py [--check].

The commands list models and rewards from it, and the shells complete from it, since to import them all would take
seconds.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.backbones import BACKBONES  # noqa: E402
from Core.commands.catalogue import FILE  # noqa: E402
from Core.commands.main import COMMANDS  # noqa: E402
from Core.config import ConfigError, load_config  # noqa: E402
from Core.config.schema import keys_of, sections_of  # noqa: E402
from Core.needs import model_needs  # noqa: E402
from Core.rewards import REGISTRY, Reward, Weight, resolve_reward  # noqa: E402
from Core.training.objectives import OBJECTIVES  # noqa: E402
from Core.utils.shipped import WITHOUT_USERS_FILES, shipped_configs  # noqa: E402
from scripts.write_command_line import help_of  # noqa: E402


def described(weights: Iterable[Weight]) -> list[dict[str, Any]]:
    """What is known of published weights."""
    defaults = {entry.name: entry.default for entry in fields(Weight)}
    return [
        {name: value for name, value in asdict(weight).items() if value != defaults[name]}
        for weight in dict.fromkeys(weights)
    ]


def loads_by_itself(file: Path) -> bool:
    """Whether the config needs no file of its user's."""
    try:
        load_config([str(file)])
    except ConfigError:
        return False
    return True


def model(file: Path) -> dict[str, Any]:
    config = load_config([str(file), *WITHOUT_USERS_FILES])
    source = next(iter(model_needs(config.models.backbone, config.family))).weight
    named = {"source": "ships with VADER" if source.is_local else source.source}
    return named | {
        "family": config.models.backbone,
        "for_init": config.run.is_vader_training and not source.is_local and loads_by_itself(file),
    }


def reward(name: str) -> dict[str, Any]:
    cls = resolve_reward(name)
    required = required_arguments(cls)
    parts = [part for part in cls.scorers() if part != name]
    weights = [*cls.info.weights.values()]
    weights += [weight for part in parts for weight in resolve_reward(part).info.weights.values()]
    return {
        "summary": cls.info.summary,
        "range": cls.info.range,
        "better": "higher" if cls.info.higher_is_better else "lower",
        "gradient": cls.differentiable,
        "required": required,
        "several_frames": not required and cls.frames_needed({}) > 1,
        "weights": described(weights),
    }


def required_arguments(cls: type[Reward]) -> list[str]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def config_keys() -> list[str]:
    """Keys of the configuration, of every family and objective."""
    schemas = [sections_of({"backbone": family}) for family in BACKBONES]
    schemas += [sections_of({"objective": objective}) for objective in OBJECTIVES]
    return list(dict.fromkeys(key for schema in schemas for key in keys_of(schema)))


def own_flags(command: str) -> dict[str, bool]:
    """The flags that the usage or the list in a command's help names → whether a name of a value follows there."""
    lines = [line for line in help_of(command).splitlines() if line.startswith(("usage:", "  -"))]
    flags: dict[str, bool] = {}
    for name, value in re.findall(r"(?<![\w-])(--[a-z][a-z-]*)( [A-Z{])?", "\n".join(lines)):
        flags[name] = flags.get(name, False) or bool(value)
    return flags


def catalogue() -> str:
    content = {
        "models": {name: model(file) for name, file in shipped_configs().items()},
        "rewards": {name: reward(name) for name in REGISTRY},
        "keys": config_keys(),
        "flags": {command: own_flags(command) for command in COMMANDS},
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    if "--check" in sys.argv:
        return int(FILE.read_text(encoding="utf-8") != catalogue())
    FILE.write_text(catalogue(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
