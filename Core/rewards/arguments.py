"""Checks of `reward_args` against a scorer's constructor, before anything is loaded."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from Core.utils.options import describe_type, fits


def argument_errors(cls: Any, args: Mapping[str, Any], label: str, shared: Mapping[str, type]) -> list[str]:
    """Sentences on unknown, missing and ill-typed arguments of `cls(**args)`.

    label: how messages call the arguments. shared: arguments every scorer takes beside its own.
    """
    parameters = {
        n: p for n, p in inspect.signature(cls.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY
    }
    hints = get_type_hints(cls.__init__)
    allowed = {name: hints.get(name, Any) for name in parameters} | dict(shared)
    errors = [unknown_name(key, allowed, f"{label} have") for key in args if key not in allowed]
    errors += [
        f"{label}: {name!r} must be given ({describe_type(allowed[name])})"
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in args
    ]
    errors += [
        f"{label}: {key} must be {describe_type(allowed[key])}, got {value!r}"
        for key, value in args.items()
        if key in allowed and not fits(value, allowed[key])
    ]
    return errors


def unknown_name(key: Any, allowed: Mapping[str, Any] | list[str], label: str) -> str:
    """One sentence on a name that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(str(key), list(allowed), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{label} no {key!r}: {hint}allowed: {', '.join(sorted(allowed)) or 'none'}"
