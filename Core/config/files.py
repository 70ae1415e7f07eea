"""Config files and the settings of run folders, read as far as possible as data.

A Python config is a program, also where the ``_base_`` of another file names it. YAML and JSON are data: nothing in
them is run.
"""

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from Core.utils.damage import reason_of
from Core.utils.errors import ConfigError
from Core.utils.files import path_fault, read_object
from Core.utils.shipped import find_bases, find_config, hint

from .choices import beside, inherited

SUFFIXES = (".py", ".yaml", ".yml", ".json")
# What a run writes of its configuration: the same keys as data, and as a file to edit and run again.
RESOLVED, RERUN = "config.json", "config.py"
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def read_file(path: str) -> dict[str, Any]:
    """Keys of a config file, or of a run folder's resolved configuration.

    ``path`` may also be the name of a config that ships with the project.

    Raises:
        ConfigError: no such file, or one that cannot be read.
    """
    path = find_config(path)
    if errors := _file_errors(path):
        raise ConfigError(errors)
    from mmengine.config import Config as FileConfig

    file = Path(path).expanduser()
    try:
        # mmengine fills in the {{…}} of a file, which in a run's settings are the user's own words.
        read = FileConfig(read_run(file)) if file.is_dir() else _read_by_mmengine(file)
        values = read.to_dict()
        lost = _bound_names(file) - values.keys() if file.suffix == ".py" else set()
    except (Exception, SystemExit) as error:  # a Python config is a program, so anything may come out of it
        reason = str(error) or "no reason given"
        raise ConfigError(
            [f"config file {path!r} cannot be read: {type(error).__name__}: {reason}"]
        ) from error
    # mmengine drops functions, which are no values; build_config answers for those bound to a key.
    values |= {name: NotAValue() for name in lost}
    return {key: value for key, value in values.items() if not isinstance(value, ModuleType)}


def override(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` after ``--cfg-options``; a key with dots, such as ``model.from_pretrained``, is one of an entry.

    Raises:
        ConfigError: an entry cannot take a key.
    """
    from mmengine.config import Config as FileConfig

    try:
        read = FileConfig(inherited(changes, values))
        read.merge_from_dict(dict(changes))
        return read.to_dict()
    except Exception as error:  # it tells a key too many by AttributeError, TypeError or KeyError
        raise ConfigError([f"--cfg-options: {type(error).__name__}: {error}"]) from error


def _read_by_mmengine(file: Path) -> Any:
    from mmengine.config import Config as FileConfig

    _load_yaml_as_data()
    find_bases()
    with _inheriting():
        # `custom_imports` would have a YAML file import modules.
        return FileConfig.fromfile(str(file), import_custom_modules=False)


@contextmanager
def _inheriting() -> Iterator[None]:
    """Have mmengine join a config with its ``_base_`` by the rules of ``beside`` and ``inherited``.

    It would merge every dict: a mixture would keep the base's scorers, and a reward the arguments of another one.
    mmengine's own switch, ``_delete_=True``, would have to stand in the user's file.
    """
    from mmengine.config import Config as FileConfig

    merge = FileConfig._merge_a_into_b

    def merge_files(child: dict, base: dict, *nested: bool) -> dict:
        """mmengine gives the third argument where it merges the entries inside."""
        return merge(child, base if nested else inherited(child, beside(child, base)), *nested)

    FileConfig._merge_a_into_b = staticmethod(merge_files)
    try:
        yield
    finally:
        FileConfig._merge_a_into_b = staticmethod(merge)


class NotAValue:
    """Stands for a function or a module that a config file bound to a name."""

    def __repr__(self) -> str:
        return "a function or a module"


def _file_errors(path: str) -> list[str]:
    """Why there is no config file and no run folder at ``path``."""
    if fault := path_fault(path):
        return [f"config file {path[:80]!r}: {fault}"]
    file = Path(path).expanduser()
    if any((file / name).is_file() for name in (RESOLVED, RERUN)):
        return []
    if not file.is_file():
        meant = hint(path) or "give the path of a config file, or a name that `vader models` lists"
        return [f"config file {path!r} does not exist; {meant}"]
    return (
        [] if file.suffix in SUFFIXES else [f"config file {path!r} must end in one of {', '.join(SUFFIXES)}"]
    )


def _bound_names(file: Path) -> set[str]:
    """Names that a Python config's top level binds to lambdas or to other names, which may stand for functions."""
    names: set[str] = set()
    try:
        nodes = ast.parse(file.read_text(encoding="utf-8")).body
    except SyntaxError:  # mmengine's {{…}} outside a string
        return names
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Lambda, ast.Name, ast.Attribute)):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return names


@functools.cache
def _load_yaml_as_data() -> None:
    """Have mmengine read YAML, also that of a ``_base_``, without tags that run code."""
    from mmengine.fileio import BaseFileHandler, register_handler

    class DataLoader(yaml.SafeLoader):
        """YAML 1.1 takes 1e-3 and 1.5e3 for text, since it wants a point and a sign in the exponent."""

    DataLoader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("+-0123456789"))

    @register_handler(["yaml", "yml"])
    class YamlData(BaseFileHandler):
        def load_from_fileobj(self, file, **kwargs):
            return yaml.load(file, Loader=DataLoader)

        def dump_to_fileobj(self, obj, file, **kwargs):
            yaml.safe_dump(obj, file, **kwargs)

        def dump_to_str(self, obj, **kwargs):
            return yaml.safe_dump(obj, **kwargs)


def read_run(folder: Path) -> dict[str, Any] | None:
    """Keys of the configuration that a run wrote into its folder, read as data; None where there is none.

    Raises:
        ValueError, OSError: it is damaged, or holds more than data.
    """
    file = folder / RESOLVED
    if file.is_file():
        try:
            return read_object(file)
        except ValueError as error:
            raise ValueError(f"{file} is no saved configuration: {reason_of(error)}") from error
    return read_saved(folder / RERUN) if (folder / RERUN).is_file() else None


def read_saved(path: Path) -> dict[str, Any]:
    """Keys of a ``config.py`` that ``Config.save`` wrote, read as data: nothing in it is run.

    Raises:
        ValueError, OSError: no such file, or it holds more than literals.
    """
    values, line = {}, 1
    try:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            line = node.lineno
            if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
                raise ValueError
            values[node.targets[0].id] = ast.literal_eval(node.value)
    except (
        SyntaxError,
        ValueError,
        RecursionError,
        MemoryError,
    ) as error:  # the last is the parser's word for depth
        line = getattr(error, "lineno", None) or line
        raise ValueError(f"{path} is no saved configuration: line {line} is no key with a value") from error
    return values
