"""Wrong values for every key, every key of every entry and every argument of every scorer, from the schemas alone.

A new key, family, objective or scorer joins by itself.
"""

import inspect
import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import twins

from Core.backbones import BACKBONES
from Core.config import ConfigError, build_config
from Core.config.schema import keys_of, sections_of
from Core.rewards import REGISTRY, check_reward_config, resolve_reward
from Core.training.objectives import OBJECTIVES
from Core.utils.options import check_values, default_of, fits, is_sequence

ROOT = Path(__file__).resolve().parents[1]
# No key takes any of these.
WRONG = {
    "function": len,
    "object": object(),
    "bytes": b"text",
    "set": {1, 2},
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "huge": 10**400,
    "-huge": -(10**400),
    "nested list": [[["text"]]],
    "nested dict": {"no such key": {"a": {"b": 1}}},
    "deep": json.loads("[" * 200 + "]" * 200),
    "empty": "",
    "null": "a\0b",
    "long": "x" * 20_000,
    "negative": -1,
}
# Keys that take one of them.
RIGHT = {("decode_frame", "negative"), ("positive", "empty"), ("negative", "empty")}


def schema_keys(values: dict) -> dict[tuple[str, ...], Any]:
    """(key,) or (entry, key) → field, of the family and the objective that ``values`` choose."""
    known = keys_of(sections_of(values))
    paths: dict[tuple[str, ...], Any] = {(key,): entry for key, entry in known.items()}
    for key, entry in known.items():
        if schema := entry.metadata["entry"]:
            paths |= {(key, inner.name): inner for inner in fields(schema)}
    return paths


def wrong_values(name: str, annotation: Any) -> dict[str, Any]:
    """Each wrong value, and for a list of things also lists of it."""
    values = {kind: value for kind, value in WRONG.items() if (name, kind) not in RIGHT}
    if is_sequence(annotation):
        length = next((n for n in (1, 2, 3) if fits(["x"] * n, annotation) or fits([1] * n, annotation)), 1)
        # An empty text in a list may mean that a prompt has none.
        values |= {f"list of {kind}": [value] * length for kind, value in values.items() if kind != "empty"}
    return values


def changed(values: dict, path: tuple[str, ...], value: Any) -> dict:
    if len(path) == 1:
        return {**values, path[0]: value}
    return {**values, path[0]: {**(values.get(path[0]) or {"monitor": "motion"}), path[1]: value}}


@pytest.fixture(scope="module")
def values(twin, tmp_path_factory) -> dict:
    return twins.settings(twin, tmp_path_factory.mktemp("fuzz") / "run")


@pytest.mark.parametrize("path", schema_keys({}), ids=".".join)
def test_every_key_refuses_what_is_wrong(values, path):
    for kind, value in wrong_values(path[-1], schema_keys({})[path].type).items():
        with pytest.raises(ConfigError) as error:
            build_config(changed(values, path, value))
            pytest.fail(f"{'.'.join(path)} took {kind}")
        named = (path[-1], path[0], "no such key")
        assert any(name in s for s in error.value.errors for name in named), (kind, error.value.errors)
        assert all("\n" not in sentence and len(sentence) < 600 for sentence in error.value.errors), kind


@pytest.mark.parametrize(
    "choice",
    [{"backbone": name} for name in BACKBONES] + [{"objective": name} for name in OBJECTIVES],
    ids=str,
)
def test_every_family_and_objective_states_types_and_ranges(choice):
    for path, entry in schema_keys(choice).items():
        for kind, value in wrong_values(path[-1], entry.type).items():
            free = entry.type is dict or "dict" in str(entry.type)
            if free and entry.metadata["entry"] is None and kind.endswith("nested dict"):
                continue  # what its keys are, is not the schema's to say
            if kind == "empty" and default_of(entry) == "":
                continue  # the same as leaving it out
            nested = {path[0]: value} if len(path) == 1 else {path[0]: {path[1]: value}}
            assert check_values(keys_of(sections_of(choice)), nested), (path, kind)


REQUIRED = {
    "label": "fox",
    "command": "true",
    "reward": "motion",
    "target": 1.0,
    "positive": "a",
    "negative": "b",
}


@pytest.mark.parametrize("name", REGISTRY)
def test_every_argument_of_every_scorer_refuses_what_is_wrong(name):
    parameters = inspect.signature(resolve_reward(name).__init__).parameters.values()
    own = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    required = {key: REQUIRED[key] for key in own if own[key].default is inspect.Parameter.empty}
    for key in [*own, "slice_size"]:
        for kind, value in WRONG.items():
            if (kind == "negative" and key != "slice_size") or (key, kind) in RIGHT:
                continue  # a target may be negative
            errors = check_reward_config(name, {**required, key: value})
            assert errors and all(len(sentence) < 600 for sentence in errors), (key, kind)


@pytest.mark.parametrize("setting", ["model.depth=-1", "seed=" + "9" * 5000])
def test_the_command_answers_at_once(values, tmp_path, setting):
    config = twins.config_file(tmp_path / "config.py", values)
    script = ROOT / "Open-Sora" / "scripts" / "train_t2v_lora.py"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(script), str(config), "--cfg-options", setting],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error: " in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
