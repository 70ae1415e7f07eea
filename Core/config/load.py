"""From a config file and flags to a checked configuration."""

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from Core.utils.errors import ConfigError
from Core.utils.options import FlagParser, add_flags, check_values, default_of, parse_literal, shown
from Core.utils.registry import did_you_mean
from Core.utils.shipped import find_config

from .checks import config_errors
from .choices import CHOICES, beside, schemas_of
from .files import SUFFIXES, NotAValue, override, read_file
from .schema import Config, keys_of

# Keys of earlier versions, with the value that meant "off": a config file may still hold that.
RETIRED = {"prefix_cache": 1, "noise_repeats": 1}


def load_config(argv: Sequence[str] | None = None) -> Config:
    """The configuration of ``CONFIG [flags]``.

    Raises:
        ConfigError: with every error found; nothing has been loaded by then.
    """
    values, flags = parse_arguments(argv)
    return build_config(values, flags)


def parse_arguments(argv: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of the file, and flags; which flags there are depends on the family and the objective chosen.

    A family, an objective or a reward that a flag names takes the place of the file's, together with its keys.

    Raises:
        ConfigError: an unreadable file or an unknown flag.
    """
    first = FlagParser(add_help=False, allow_abbrev=False)
    first.add_argument("config", nargs="?")
    _add_overrides(first)
    for flag in CHOICES:
        first.add_argument(f"--{flag}", default=argparse.SUPPRESS)
    _refuse_flags_first(sys.argv[1:] if argv is None else argv)
    chosen, rest = first.parse_known_args(argv)
    helping = bool({"-h", "--help"} & set(rest))
    changes = _changes(chosen.cfg_options)
    values: dict[str, Any] = {}
    if chosen.config is not None and not (helping and not Path(find_config(chosen.config)).exists()):
        values = read_file(chosen.config)
    named = {key: vars(chosen)[key] for key in CHOICES if key in vars(chosen)}
    schemas = schemas_of({**values, **changes, **named})
    flags = vars(_parser(schemas).parse_args(argv))
    del flags["config"], flags["cfg_options"]
    values = override(beside({**changes, **flags}, values), changes) if changes else beside(flags, values)
    known = keys_of(schemas)
    return {key: v for key, v in values.items() if key in known or not isinstance(v, NotAValue)}, flags


def _changes(entries: Sequence[str]) -> dict[str, Any]:
    """What ``--cfg-options`` sets, by key."""
    if errors := [f"--cfg-options takes KEY=VALUE, got {entry!r}" for entry in entries if "=" not in entry]:
        raise ConfigError(errors)
    return {key: parse_literal(value) for key, _, value in (entry.partition("=") for entry in entries)}


def _refuse_flags_first(argv: Sequence[str]) -> None:
    """What follows a flag may be its value or the config file; which, only the config's family would tell."""
    flag = argv[0].partition("=")[0] if argv else ""
    if flag.startswith("--") and flag not in ("--help", *(f"--{key}" for key in CHOICES)):
        raise ConfigError([f"the config file comes before the flags: CONFIG {flag} …"])


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="set any key, also inside an entry (model.from_pretrained=…)",
    )


def _parser(schemas: Mapping[str, type]) -> FlagParser:
    parser = FlagParser(
        description="Train a LoRA adapter by reward gradient, or generate videos (is_vader_training=False).",
        allow_abbrev=False,
    )
    parser.add_argument("config", help=f"config file ({', '.join(SUFFIXES)})")
    _add_overrides(parser)
    for name, schema in schemas.items():
        group = parser.add_argument_group(name, (schema.__doc__ or "").partition("\n")[0])
        add_flags(group, schema)
        if name == "family":
            for flag, (entry, key) in schema.nested_flags.items():  # type: ignore[attr-defined]
                option = "--" + flag.replace("_", "-")
                group.add_argument(option, type=parse_literal, metavar="VALUE", help=f"{key} of {entry}")
    return parser


def build_config(values: Mapping[str, Any], flags: Mapping[str, Any] | None = None) -> Config:
    """A checked configuration from keys of a file and flags that override them.

    Raises:
        ConfigError: with every error found.
    """
    values, errors = _without_retired({**values, **(flags or {})})
    schemas = schemas_of(values)
    nested = schemas["family"].nested_flags  # type: ignore[attr-defined]
    for flag in set(nested) & set(flags or {}):
        entry, inner = nested[flag]
        given = values.get(entry) or {}
        if (value := values.pop(flag)) is not None and isinstance(given, Mapping):
            values[entry] = {**given, inner: value}
    if isinstance(values.get("prompt"), str):
        values["prompt"] = [values["prompt"]]
    for key, table in CHOICES.items():
        if isinstance(values.get(key), str) and values[key] not in table:
            errors.append(_unknown_choice(key, values.pop(key), table))
    known = keys_of(schemas)
    sound: dict[str, Any] = {}
    faulty: list[str] = []
    for key, value in values.items():
        sound |= _sound_part(key, value, known, errors, faulty)
    # The rest is checked without the faulty values, so that all errors come at once.
    config = Config.of(sound)
    more = config_errors(config)
    errors += [error for error in more if not error.startswith(tuple(f"{name} " for name in faulty))]
    if errors:
        raise ConfigError(list(dict.fromkeys(errors)))
    return config


def _sound_part(
    key: str, value: Any, known: Mapping[str, Any], errors: list[str], faulty: list[str]
) -> dict[str, Any]:
    """``{key: value}`` if nothing is wrong with it, else what is left of it; adds to ``errors`` and ``faulty``."""
    found = _key_errors(key, value, known)
    if not found:
        return {key: value}
    errors += found
    if key not in known or known[key].metadata["entry"] is None or not isinstance(value, Mapping):
        faulty.append(key)
        return {}
    wrong = {inner for inner in value if check_values(known, {key: {inner: value[inner]}})}
    faulty += [f"{key}.{inner}" for inner in wrong]
    defaults = {inner.name: default_of(inner) for inner in fields(known[key].metadata["entry"])}
    return {key: {inner: value[inner] for inner in value.keys() - wrong} | _of(defaults, wrong)}


def _of(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key in keys}


def _key_errors(key: str, value: Any, known: Mapping[str, Any]) -> list[str]:
    if key in known:
        return check_values(known, {key: value})
    owner = _owner(key)
    if owner:
        return [f"{key} is a key of {owner}, which is not the one chosen; remove it"]
    return check_values(known, {key: value})


def _owner(key: str) -> str:
    """The family or objective that has a key which the chosen ones have not."""
    for kind, table in CHOICES.items():
        for name in table:
            if key in keys_of({"": table.resolve(name).settings_class}):
                return f"{kind} {name!r}"
    return ""


def _unknown_choice(key: str, value: str, table: Mapping[str, Any]) -> str:
    hint = did_you_mean(value, list(table))
    return f"{key} must be one of {', '.join(table)}, got {shown(value)}" + (f": {hint}" if hint else "")


def _without_retired(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    errors = [
        f"{key} was removed, since measurement showed no gain; remove it"
        for key, off in RETIRED.items()
        if values.get(key, off) != off
    ]
    return {key: value for key, value in values.items() if key not in RETIRED}, errors
