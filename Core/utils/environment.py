"""Where and with what a run was made, written beside its results."""

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from Core.utils.files import read_object, write_whole

logger = logging.getLogger("vader")
ENVIRONMENT = "environment.json"
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "av",
    "numpy",
)


def describe() -> dict[str, Any]:
    """Command, code, hardware and versions of this process."""
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": os.getcwd(),
        "commit": _commit(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def record_environment(folder: Path, weights: Mapping[str, str] | None = None) -> None:
    """Add this start to ``environment.json``; a run that was continued lists every start, once each.

    Args:
        weights: commits of the weights from the hub, by key of the configuration.
    """
    starts = read_starts(folder)
    now = describe() | ({"weights": dict(weights)} if weights else {})
    if now not in starts:
        starts.append(now)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / ENVIRONMENT, json.dumps({"starts": starts}, indent=1) + "\n")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """What ``record_environment`` wrote, oldest first; empty where it never ran, or with a warning where damaged."""
    file = folder / ENVIRONMENT
    if not file.exists():
        return []
    try:
        starts = read_object(file)["starts"]
        if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
            raise ValueError("its starts are no list of objects")
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s cannot be read (%s); what it said of earlier starts is lost", file, error)
        return []
    return starts


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the code, with ``+`` when files outside docs/ differ; None outside a repository."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno", ":/", ":(exclude,top)docs"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
