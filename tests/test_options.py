"""Options as dataclass fields: types, bounds, flags, and messages that name the key."""

from dataclasses import dataclass, fields
from typing import Literal

import pytest

from Core.utils.options import (
    ConfigError,
    FlagParser,
    add_flags,
    check_values,
    describe_type,
    fits,
    option,
    parse_literal,
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    depth: int = option(28, "blocks", minimum=1)
    share: float = option(0.1, "a share", minimum=0, below=1)


@dataclass(frozen=True, kw_only=True)
class Schema:
    steps: int = option(3, "number of steps", minimum=1)
    rate: float = option(0.5, "a rate", above=0)
    mode: Literal["last", "rand"] = option("last", "a mode")
    names: list[str] | None = option(None, "some names")
    size: tuple[int, int] | None = option(None, "height, width")
    parts: dict = option({}, "parts")
    model: dict | None = option(None, "an entry", entry=Entry)
    quiet: bool = option(False, "100% quiet")


KNOWN = {entry.name: entry for entry in fields(Schema)}


def flags(*argv: str) -> dict:
    parser = FlagParser(allow_abbrev=False)
    add_flags(parser, Schema)
    return vars(parser.parse_args(argv))


def test_mutable_defaults_are_not_shared():
    first = Schema()
    first.parts["a"] = 1
    assert Schema().parts == {}


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (3, int),
        (3, float),
        (0.5, float),
        ("last", Literal["last", "rand"]),
        (None, list[str] | None),
        (["a"], list[str] | None),
        (("a",), list[str]),
        ((1, 2), tuple[int, int]),
        ([1, 2], tuple[int, int]),
        ({}, dict),
        ("a", str | int),
        (2, str | int),
        (True, bool),
    ],
)
def test_values_that_fit(value, annotation):
    assert fits(value, annotation)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (True, int),
        (True, float),
        (1, bool),
        (0.5, int),
        ("3", int),
        ("first", Literal["last", "rand"]),
        (1.0, Literal[1, 2]),
        ("a", list[str]),
        ([1], list[str]),
        ((1, 2, 3), tuple[int, int]),
        ((1, 0.5), tuple[int, int]),
        ([], dict),
        (None, int),
        (0.5, str | int),
    ],
)
def test_values_that_do_not_fit(value, annotation):
    assert not fits(value, annotation)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "unknown key 'stepz': did you mean 'steps'?"),
        ({"wxyz": 3}, "unknown key 'wxyz'; remove it"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"rate": 0}, "rate must be above 0, got 0"),
        ({"rate": float("nan")}, "rate must be finite, got nan"),
        ({"rate": float("inf")}, "rate must be finite, got inf"),
        ({"rate": float("-inf")}, "rate must be finite, got -inf"),
        ({"size": (3, 10**400)}, f"size must be at most 1000000000, got 1{'0' * 199}…"),
        ({"mode": "first"}, "mode must be one of 'last', 'rand', got 'first'"),
        ({"names": "fox"}, "names must be a list (a string each) or None, got 'fox'"),
        (
            {"size": (1, 2, 3)},
            "size must be a list of 2 entries (a whole number each) or None, got (1, 2, 3)",
        ),
        ({"parts": "a"}, "parts must be a dict, got 'a'"),
        ({"quiet": "yes"}, "quiet must be True or False, got 'yes'"),
        ({"model": [1]}, "model must be a dict or None, got [1]"),
        ({"model": {"depth": 0}}, "model.depth must be at least 1, got 0"),
        ({"model": {"depth": "2"}}, "model.depth must be a whole number, got '2'"),
        ({"model": {"depth": True}}, "model.depth must be a whole number, got True"),
        ({"model": {"share": 1}}, "model.share must be below 1, got 1"),
        ({"model": {"depht": 2}}, "unknown key 'model.depht': did you mean 'depth'?"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(values, message):
    assert check_values(KNOWN, values) == [message]


def test_all_errors_come_at_once():
    assert len(check_values(KNOWN, {"steps": "a", "rate": -1, "modes": "last", "quiet": None})) == 4


def test_types_are_described_in_words():
    assert describe_type(str | int) == "a string or a whole number"
    assert describe_type(list[str] | None) == "a list (a string each) or None"


def test_flags_spell_python_values():
    given = flags(
        "--steps", "7", "--rate=1e-3", "--names", "['a', 'b']", "--size", "(3, 4)", "--mode", "rand"
    )
    assert given == dict(steps=7, rate=1e-3, names=["a", "b"], size=(3, 4), mode="rand")


def test_lists_are_given_as_several_values_too():
    assert flags("--names", "a fox", "b", "--size", "3", "4") == dict(names=["a fox", "b"], size=[3, 4])
    assert flags("--names", "1984") == dict(names=["1984"])
    assert flags("--names", "None") == dict(names=None)


def test_a_bare_flag_means_true_and_absent_flags_set_nothing():
    assert flags("--quiet") == {"quiet": True}
    assert flags("--quiet", "False") == {"quiet": False}
    assert flags() == {}


@pytest.mark.parametrize("text", ["a fox", "4s", "9:16", "path/to/file", "", "{unclosed"])
def test_text_that_is_no_python_value_stays_text(text):
    assert parse_literal(text) == text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stepz", "3"], "unknown flag --stepz: did you mean '--steps'?"),
        (["--zzzzzzz"], "unknown flag --zzzzzzz; see --help"),
    ],
)
def test_unknown_flags_are_named(argv, message):
    with pytest.raises(ConfigError) as error:
        flags(*argv)
    assert error.value.errors == [message]


def test_help_shows_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit):
        flags("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "number of steps (default 3)" in shown and "100% quiet (default False)" in shown
