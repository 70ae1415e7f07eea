"""Keys that choose something that has keys of its own: a family, an objective, a reward, monitors.

Where a child config, ``--cfg-options`` or a flag chooses another, what was set for the former one must not reach it.
"""

import logging
import os
from collections.abc import Collection, Mapping
from typing import Any

from Core.backbones import BACKBONES
from Core.training.objectives import OBJECTIVES
from Core.utils.options import default_of, shown
from Core.utils.registry import Registry

from .schema import keys_of, sections_of

logger = logging.getLogger("vader")
# Keys that choose a section of the configuration, and those that choose scorers, with the key of their arguments.
CHOICES: dict[str, Registry[Any]] = {"backbone": BACKBONES, "objective": OBJECTIVES}
SECTIONS = {"backbone": "family", "objective": "objective"}
ARGUMENTS = {"reward_fn": "reward_args", "monitors": "monitor_args"}


def schemas_of(choice: Mapping[str, Any]) -> dict[str, type]:
    """The sections that a choice of family and objective gives; a wrong one is reported later, with all else."""
    return sections_of({key: choice[key] for key in CHOICES if choice.get(key) in list(CHOICES[key])})


def inherited(child: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """What ``child`` inherits of ``base``, to be merged with it entry by entry.

    Only the dicts of a model family are entries that merge; of any other key the child's value is the whole value.
    """
    entries = keys_of({"family": schemas_of({**base, **child})["family"]})
    whole = {key for key, value in child.items() if isinstance(value, Mapping) and key not in entries}
    return {key: value for key, value in base.items() if key not in whole}


def beside(chosen: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``values`` still holds where ``chosen`` overrides them; what does not is named in the log."""
    values = _without_former_sections(chosen, values)
    for key, arguments in ARGUMENTS.items():
        given = values.get(arguments)
        if key in chosen and arguments not in chosen and isinstance(given, Mapping):
            former = values.get(key, default_of(keys_of(schemas_of({}))[key]))
            values[arguments] = _still_meant(key, former, chosen[key], given)
    return values


def _without_former_sections(chosen: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without the keys of a family or an objective that is no longer the one chosen."""
    before, after = schemas_of(values), schemas_of({**values, **chosen})
    for key, section in SECTIONS.items():
        if before[section] is not after[section]:
            own = keys_of({section: before[section]})
            _say_left_out([name for name in values if name in own and name not in chosen], key, chosen[key])
            values = {name: value for name, value in values.items() if name not in own}
    return dict(values)


def _still_meant(key: str, former: Any, chosen: Any, given: Mapping[str, Any]) -> Any:
    """Arguments of the scorers that both name, in the form that the chosen ones want: by scorer, or of the only one."""
    if former == chosen:
        return given
    of_each = {former: given} if isinstance(former, str) else given
    names = [chosen] if isinstance(chosen, str) else chosen if isinstance(chosen, Collection) else []
    kept = {name: of_each[name] for name in names if isinstance(name, str) and name in of_each}
    gone = [name for name in of_each if name not in kept and of_each[name]]
    _say_left_out([f"the arguments of {name}" for name in gone], key, chosen)
    return kept.get(chosen, {}) if isinstance(chosen, str) else kept


def _say_left_out(names: list[str], key: str, chosen: Any) -> None:
    if names and os.environ.get("LOCAL_RANK", "0") == "0":
        logger.warning("%s=%s: left out %s", key, shown(chosen), ", ".join(names))
