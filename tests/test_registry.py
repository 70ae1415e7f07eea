"""The table of classes by name."""

import sys
from collections import OrderedDict

import pytest

from Core.utils.registry import Registry, did_you_mean


@pytest.fixture
def registry() -> Registry:
    return Registry("box", {"ordered": "collections:OrderedDict"}, otherwise=", or build one")


def test_a_module_is_imported_when_its_class_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "lazy_box.py").write_text("class Box: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("box", {"lazy": "lazy_box:Box"})
    assert "lazy_box" not in sys.modules
    assert registry.resolve("lazy") is sys.modules.pop("lazy_box").Box


def test_a_name_is_registered_once(registry):
    registry.register("plain", dict)
    assert sorted(registry) == ["ordered", "plain"]
    assert registry.resolve("plain") is dict and registry.resolve("ordered") is OrderedDict
    with pytest.raises(ValueError, match="a box named 'plain' exists already; choose another name"):
        registry.register("plain", list)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("orderd", r"unknown box 'orderd': did you mean 'ordered'\? choose one of ordered, or build one"),
        ("xyz", "unknown box 'xyz': choose one of ordered, or build one"),
        (3, "a box is named by a string, got 3"),
    ],
)
def test_another_name_is_refused(name, message, registry):
    with pytest.raises(ValueError, match=message):
        registry.resolve(name)


def test_the_nearest_name_is_offered_only_if_it_is_near():
    assert did_you_mean("stepz", ["steps", "seed"]) == "did you mean 'steps'?"
    assert did_you_mean("xyz", ["steps", "seed"]) == ""
