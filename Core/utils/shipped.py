"""The configs that ship with the project, by name: ``vader_demo``, ``wan/t2v_1_3b``.

A path is looked for in the current directory first, whoever asks: the commands, the scripts, the launchers, and the
``_base_`` of another config.
"""

import functools
import os
from pathlib import Path

from Core.utils.places import home
from Core.utils.registry import did_you_mean

# Folders of configs in a checkout or a wheel; the last is that of a patched Open-Sora checkout.
FOLDERS = ("configs", "Open-Sora/configs/opensora-v1-2/vader", "configs/opensora-v1-2/vader")
# Flags that replace the files which some configs expect their users to bring.
WITHOUT_USERS_FILES = ("--prompt", "a fox", "--prompt-path", "None", "--base-adapters", "[]")
# What a path may be relative to beside the current directory.
ROOTS = ("", "Open-Sora")


def shipped_configs() -> dict[str, Path]:
    """Name → file of each config that trains or generates, by folder and name."""
    found: dict[str, Path] = {}
    for folder in (home() / name for name in FOLDERS):
        for file in sorted(folder.rglob("*.py")):
            if "opensora-v1-2" not in file.relative_to(folder).parts:
                found[file.relative_to(folder).with_suffix("").as_posix()] = file
    found.pop("training", None)  # a base for others
    return found


def find_config(path: str, beside: Path = Path()) -> str:
    """``path`` where there is something, seen from ``beside``; else the shipped config of that path or name.

    A path that leads nowhere comes back as it is.
    """
    if not path.strip() or "\0" in path or _exists(beside / Path(os.path.expanduser(path))):
        return path
    for root in ROOTS:
        if (home() / root / path).is_file():
            return str(home() / root / path)
    name = path.removesuffix(".py").removeprefix("configs/")
    return str(shipped_configs().get(name, path))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long
        return False


def hint(path: str) -> str:
    """The shipped config that a path which leads nowhere may have meant; empty where none is near."""
    return did_you_mean(path.removesuffix(".py"), shipped_configs())


@functools.cache
def find_bases() -> None:
    """Have mmengine look for a ``_base_`` as ``find_config`` does."""
    from mmengine.config import Config as FileConfig

    original = FileConfig._get_cfg_path

    def get_cfg_path(base: str, file: str) -> tuple[str, str | None]:
        found = find_config(base, Path(file).parent)
        return (found, None) if found != base else original(base, file)

    FileConfig._get_cfg_path = staticmethod(get_cfg_path)
