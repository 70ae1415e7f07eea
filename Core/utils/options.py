"""Options as fields of a frozen dataclass: documented, typed, bounded, and settable by file or flag."""

import argparse
import ast
import math
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, field, fields
from functools import partial
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from Core.utils.errors import ConfigError
from Core.utils.registry import did_you_mean

ARTICLES = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}
ARTICLES |= {dict: "a dict", Mapping: "a dict", type(None): "None"}


def option(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    entry: type | None = None,
    remakes_videos: bool = False,
    may_change: bool = False,
) -> Any:
    """A dataclass field with its documentation, its bounds and what it affects.

    Args:
        default: copied per instance where it is mutable.
        minimum, maximum, above, below: bounds of a number, or of each number of a sequence.
        entry: dataclass of options that describes the keys of a dict.
        remakes_videos: a generated video depends on it.
        may_change: a run that is resumed may have another value.
    """
    bounds = {"at least": minimum, "at most": maximum, "above": above, "below": below}
    metadata: dict[str, Any] = {"doc": doc, "bounds": bounds, "entry": entry}
    metadata |= {"remakes_videos": remakes_videos, "may_change": may_change}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


# An option that generated videos depend on, and one that a resumed run may change.
video_option = partial(option, remakes_videos=True)
free_option = partial(option, may_change=True)


def default_of(entry: Field) -> Any:
    if entry.default is not MISSING:
        return entry.default
    factory: Any = entry.default_factory
    return factory()


def describe_type(annotation: Any) -> str:
    """The type in words, for messages and documentation."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args)
    if origin is Literal:
        return "one of " * (len(args) > 1) + ", ".join(repr(arg) for arg in args)
    if origin is list:
        return f"a list ({describe_type(args[0])} each)"
    if origin is tuple:
        return f"a list of {len(args)} entries ({describe_type(args[0])} each)"
    kind = origin or annotation
    return ARTICLES[kind] if kind in ARTICLES else getattr(kind, "__name__", str(kind))


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value from a config file has the annotated type; an int serves as a float, a bool as no number."""
    if annotation is Any:
        return True
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(fits(item, args[0]) for item in value)
    if origin is tuple:
        same_length = isinstance(value, (list, tuple)) and len(value) == len(args)
        return same_length and all(fits(v, a) for v, a in zip(value, args, strict=True))
    if annotation is type(None):
        return value is None
    kind = origin or annotation
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, Mapping if kind is dict else kind)


def check_values(known: Mapping[str, Field], values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Sentences on unknown keys, wrong types and values out of bounds, entries included.

    Args:
        known: fields by key.
        prefix: of the keys in messages, such as ``model.``.
    """
    errors = [unknown_key(key, known, prefix) for key in values if key not in known]
    for key, value in values.items():
        if key in known:
            errors += _value_errors(known[key], f"{prefix}{key}", value)
    return errors


def _value_errors(entry: Field, name: str, value: Any) -> list[str]:
    if not fits(value, entry.type):
        return [f"{name} must be {describe_type(entry.type)}, got {_shown(value)}"]
    if (schema := entry.metadata["entry"]) and value:
        return check_values({inner.name: inner for inner in fields(schema)}, value, f"{name}.")
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return [error for number in numbers if (error := _number_error(entry, name, number))][:1]


def _number_error(entry: Field, name: str, value: Any) -> str:
    """What is wrong with the size of a number; empty for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if not _is_finite(value):
        return f"{name} must be finite, got {_shown(value)}"
    holds: dict[str, Callable[[Any, Any], bool]] = {
        "at least": lambda a, b: a >= b,
        "at most": lambda a, b: a <= b,
        "above": lambda a, b: a > b,
        "below": lambda a, b: a < b,
    }
    for words, bound in entry.metadata["bounds"].items():
        if bound is not None and not holds[words](value, bound):
            return f"{name} must be {words} {bound}, got {_shown(value)}"
    return ""


def _is_finite(value: int | float) -> bool:
    """Whether a float can hold the number."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: Any, limit: int = 200) -> str:
    """``repr`` that fits a sentence; Python refuses to print numbers of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= limit else f"{text[:limit]}…"


def unknown_key(key: str, known: Collection[str], prefix: str = "") -> str:
    hint = did_you_mean(key, known)
    return f"unknown key {prefix + str(key)!r}" + (f": {hint}" if hint else "; remove it")


def parse_literal(text: str) -> Any:
    """A flag's text as the Python value it spells, else as the string it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def typed_literal(annotation: Any) -> Callable[[str], Any]:
    """``parse_literal`` that keeps the text where text is wanted: a folder may be named 2024, a resolution 512."""

    def read(text: str) -> Any:
        value = parse_literal(text)
        return text if fits(text, annotation) and not fits(value, annotation) else value

    return read


def is_sequence(annotation: Any) -> bool:
    """Whether a list or tuple is among the types that fit."""
    return get_origin(annotation) in (list, tuple) or any(map(is_sequence, get_args(annotation)))


class SequenceAction(argparse.Action):
    """Takes ``--flag a b`` as well as ``--flag "['a', 'b']"``; a single value that is no sequence becomes one."""

    def __init__(self, *args, annotation: Any, **kwargs):
        super().__init__(*args, **kwargs)
        self.annotation = annotation

    def __call__(self, parser, namespace, values: Any, option_string=None) -> None:
        literals = [parse_literal(text) for text in values]
        alone = [literals[0], values[0]] if len(values) == 1 else []
        readings = [*alone, literals, list(values)]
        fitting = (reading for reading in readings if fits(reading, self.annotation))
        setattr(namespace, self.dest, next(fitting, literals) if values else True)


class FlagParser(argparse.ArgumentParser):
    """argparse whose error is one sentence that names the nearest flag."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if message.startswith("unrecognized arguments"):
            hint = did_you_mean(unknown, self._option_string_actions)
            message = f"unknown flag {unknown}" + (f": {hint}" if hint else "; see --help")
        raise ConfigError([message])


def add_flags(parser: Any, schema: type) -> None:
    """One ``--flag`` for each field of ``schema``; a bare flag means True, and sequences take several values.

    Args:
        parser: a parser, or a group of one.
    """
    for entry in fields(schema):
        one = {"nargs": "?", "const": True, "type": typed_literal(entry.type)}
        several = {"nargs": "*", "action": SequenceAction, "annotation": entry.type}
        parser.add_argument(
            "--" + entry.name.replace("_", "-"),
            dest=entry.name,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{entry.metadata['doc']} (default {default_of(entry)!r})".replace("%", "%%"),
            **(several if is_sequence(entry.type) else one),
        )
