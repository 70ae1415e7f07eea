"""Options as fields of a frozen dataclass: documented, typed, bounded, and settable by file or flag."""

import argparse
import ast
import difflib
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, Literal, Union, get_args, get_origin

ARTICLES = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", dict: "a dict"}


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one sentence each."""

    def __init__(self, errors: list[str]):
        super().__init__("\n".join(errors))
        self.errors = errors


def option(default: Any, doc: str, *, minimum: float | None = None, above: float | None = None) -> Any:
    """A dataclass field with its documentation and bounds; mutable defaults are copied per instance."""
    metadata = {"doc": doc, "minimum": minimum, "above": above}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(entry: Field) -> Any:
    return entry.default if entry.default is not MISSING else entry.default_factory()


def describe_type(annotation: Any) -> str:
    """The type in words, for messages and documentation."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin is list:
        return f"a list ({describe_type(args[0])} each)"
    if origin is tuple:
        return f"a list of {len(args)} entries ({describe_type(args[0])} each)"
    if annotation is type(None):
        return "None"
    return ARTICLES[origin or annotation]


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value from a config file has the annotated type; an int serves as a float."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(fits(entry, args[0]) for entry in value)
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


def check_values(schema: type, values: Mapping[str, Any]) -> list[str]:
    """Sentences on unknown keys, wrong types and values out of bounds."""
    known = {entry.name: entry for entry in fields(schema)}
    errors = [unknown_key(key, known) for key in values if key not in known]
    for key, value in values.items():
        if key in known:
            errors += _value_errors(known[key], value)
    return errors


def _value_errors(entry: Field, value: Any) -> list[str]:
    if not fits(value, entry.type):
        return [f"{entry.name} must be {describe_type(entry.type)}, got {value!r}"]
    minimum, above = entry.metadata["minimum"], entry.metadata["above"]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and minimum is not None and not value >= minimum:
        return [f"{entry.name} must be at least {minimum}, got {value}"]
    if number and above is not None and not value > above:
        return [f"{entry.name} must be above {above}, got {value}"]
    return []


def unknown_key(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key {key!r}" + (f": did you mean {near[0]!r}?" if near else "; remove it")


def parse_literal(text: str) -> Any:
    """A flag's text as the Python value it spells, else as the string it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class FlagParser(argparse.ArgumentParser):
    """argparse whose error is one sentence that names the nearest flag."""

    def error(self, message: str) -> None:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if message.startswith("unrecognized arguments"):
            near = difflib.get_close_matches(unknown, self._option_string_actions, n=1, cutoff=0.5)
            message = f"unknown flag {unknown}" + (f": did you mean {near[0]}?" if near else "; see --help")
        raise ConfigError([message])


def add_flags(parser: argparse.ArgumentParser, schema: type) -> None:
    """One ``--flag`` for each field of ``schema``; a bare flag means True."""
    for entry in fields(schema):
        parser.add_argument(
            "--" + entry.name.replace("_", "-"),
            dest=entry.name,
            nargs="?",
            const=True,
            type=parse_literal,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{entry.metadata['doc']} (default {default_of(entry)!r})".replace("%", "%%"),
        )
