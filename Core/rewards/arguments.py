"""Checks of ``reward_args`` against a scorer's constructor, before anything is loaded."""

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from Core.utils.options import Bounds, describe_type, fits, shown
from Core.utils.registry import did_you_mean


def argument_errors(cls: Any, args: Mapping[str, Any], label: str, shared: Mapping[str, type]) -> list[str]:
    """Sentences on unknown, missing and ill-typed arguments of ``cls(**args)``.

    Args:
        label: how messages call the arguments.
        shared: arguments every scorer takes beside its own.
    """
    parameters = {
        n: p for n, p in inspect.signature(cls.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY
    }
    hints = get_type_hints(cls.__init__, include_extras=True)
    allowed = {name: hints.get(name, Any) for name in parameters} | dict(shared)
    errors = [unknown_name(key, allowed, f"{label} have") for key in args if key not in allowed]
    errors += [
        f"{label}: {name!r} must be given ({describe_type(allowed[name])})"
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in args
    ]
    for key, value in args.items():
        if key in allowed:
            errors += [f"{label}: {error}" for error in _value_errors(key, value, allowed[key])]
    return errors


def _value_errors(name: str, value: Any, annotation: Any) -> list[str]:
    """What is wrong with one argument; bounds of its own stand in its type: ``Annotated[int, Bounds(minimum=1)]``."""
    if not fits(value, annotation):
        return [f"{name} must be {describe_type(annotation)}, got {shown(value)}"]
    stated = [extra for extra in getattr(annotation, "__metadata__", ()) if isinstance(extra, Bounds)]
    return (stated or [Bounds(empty=isinstance(value, Mapping))])[0].errors(name, value)


def unknown_name(key: Any, allowed: Mapping[str, Any] | list[str], label: str) -> str:
    """One sentence on a name that does not exist, with the nearest one that does."""
    hint = did_you_mean(key, allowed)
    return f"{label} no {key!r}: {hint and hint + ' '}allowed: {', '.join(sorted(allowed)) or 'none'}"
