"""Checks of `reward_args` against a scorer's constructor, before anything is loaded."""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


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
        f"{label}: {name!r} must be given ({type_name(allowed[name])})"
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in args
    ]
    errors += [
        f"{label}: {key} must be {type_name(allowed[key])}, got {value!r}"
        for key, value in args.items()
        if key in allowed and not fits(value, allowed[key])
    ]
    return errors


def unknown_name(key: Any, allowed: Mapping[str, Any] | list[str], label: str) -> str:
    """One sentence on a name that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(str(key), list(allowed), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{label} no {key!r}: {hint}allowed: {', '.join(sorted(allowed)) or 'none'}"


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type; an int passes as a float, a bool never as a number."""
    if hint is Any:
        return True
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if origin is not None:
        return isinstance(value, origin)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """A type annotation in words."""
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(option) for option in get_args(hint))
    words = {
        str: "a string",
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        type(None): "None",
    }
    words |= {dict: "a dict", Mapping: "a dict"}
    return words.get(origin or hint, getattr(hint, "__name__", str(hint)))
