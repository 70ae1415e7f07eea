"""Options as fields of a frozen dataclass: documented, typed, bounded, and settable by file or flag."""

import argparse
import ast
import operator
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from Core.utils.errors import ConfigError
from Core.utils.files import path_fault
from Core.utils.registry import did_you_mean

# Beyond these a number or a text is a slip, whatever the key; a key may state its own bounds.
NUMBER_LIMIT, TEXT_LIMIT, NESTING_LIMIT = 10**9, 10_000, 20
ARTICLES = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}
ARTICLES |= {dict: "a dict", Mapping: "a dict", type(None): "None"}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a value of the right type must be beside that.

    minimum, maximum, above, below: of a number, or of each number of a sequence. path: a text that names a file or
    folder, or a hub id. empty: a text, a list or a dict may be empty.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    path: bool = False
    empty: bool = False

    def errors(self, name: str, value: Any) -> list[str]:
        """What is wrong with the value of ``name``, one sentence at most; types are not looked at."""
        items = value if isinstance(value, (list, tuple)) else [value]
        found = [self._emptiness(name, value), *(self._fault(name, item) for item in items)]
        return [error for error in found if error][:1]

    def _emptiness(self, name: str, value: Any) -> str:
        empty = isinstance(value, (str, list, tuple, Mapping)) and not (
            value.strip() if isinstance(value, str) else value
        )
        return f"{name} must not be empty; remove it, or give a value" if empty and not self.empty else ""

    def _fault(self, name: str, value: Any) -> str:
        if isinstance(value, str):
            return self._text_fault(name, value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return _data_fault(name, value)
        if value != value or value in (float("inf"), float("-inf")):
            return f"{name} must be finite, got {shown(value)}"
        for words, bound, holds in self._limits():
            if not holds(value, bound):
                return f"{name} must be {words} {bound}, got {shown(value)}"
        return ""

    def _limits(self) -> Iterator[tuple[str, float, Callable[[Any, Any], bool]]]:
        """Each bound in words, with its test; the general limit on a side where the key has none."""
        lowest = -NUMBER_LIMIT if self.minimum is None and self.above is None else self.minimum
        highest = NUMBER_LIMIT if self.maximum is None and self.below is None else self.maximum
        limits = (("at least", lowest, operator.ge), ("at most", highest, operator.le))
        strict = (("above", self.above, operator.gt), ("below", self.below, operator.lt))
        yield from ((words, bound, holds) for words, bound, holds in (*limits, *strict) if bound is not None)

    def _text_fault(self, name: str, text: str) -> str:
        if len(text) > TEXT_LIMIT:
            return f"{name} must have at most {TEXT_LIMIT} characters, got {len(text)}"
        if "\0" in text:
            return f"{name} must not hold a null character, got {shown(text)}"
        if not text.strip() and not self.empty:
            return f"{name} must not be empty or hold an empty text; remove it, or give a value"
        fault = path_fault(text) if self.path and text.strip() else ""
        return f"{name}: {fault}, got {shown(text)}" if fault else ""


def _data_fault(name: str, value: Any, depth: int = 0) -> str:
    """What in a dict or a list is no data: neither text, number, bool, None nor a dict or a list of these."""
    if depth > NESTING_LIMIT:
        return f"{name} must not be nested more than {NESTING_LIMIT} deep"
    if isinstance(value, Mapping):
        inner = [
            (f"{name}.{shown(key)}" if not isinstance(key, str) else f"{name}.{key}", v)
            for key, v in value.items()
        ]
        return next(filter(None, (_data_fault(key, v, depth + 1) for key, v in inner)), "")
    if isinstance(value, (list, tuple)):
        return next(filter(None, (_data_fault(name, item, depth + 1) for item in value)), "")
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, (str, int, float)):
        return Bounds(empty=True)._fault(name, value)
    return f"{name} must be data (text, numbers, lists, dicts), got {shown(value)}"


def option(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    path: bool = False,
    empty: bool = False,
    entry: type | None = None,
    remakes_videos: bool = False,
    may_change: bool = False,
) -> Any:
    """A dataclass field with its documentation, its bounds and what it affects.

    Args:
        default: copied per instance where it is mutable.
        minimum, maximum, above, below, path, empty: see ``Bounds``; what the default is empty of may be empty.
        entry: dataclass of options that describes the keys of a dict.
        remakes_videos: a generated video depends on it.
        may_change: a run that is resumed may have another value.
    """
    empty = empty or default in ("", [], {})
    bounds = Bounds(minimum=minimum, maximum=maximum, above=above, below=below, path=path, empty=empty)
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


def _bare(annotation: Any) -> Any:
    """A type without what ``Annotated`` adds to it."""
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


def describe_type(annotation: Any) -> str:
    """The type in words, for messages and documentation."""
    annotation = _bare(annotation)
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
    annotation = _bare(annotation)
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
        return [f"{name} must be {describe_type(entry.type)}, got {shown(value)}"]
    if (schema := entry.metadata["entry"]) and value:
        return check_values({inner.name: inner for inner in fields(schema)}, value, f"{name}.")
    return entry.metadata["bounds"].errors(name, value)


def shown(value: Any, limit: int = 200) -> str:
    """``repr`` that fits a sentence; Python refuses to print numbers of thousands of digits and deep nesting."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
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
