"""Where the proof runs: card, driver, versions, and the rates that times are compared with."""

import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

from Core.utils.environment import describe
from scripts.bench.meter import copy_bandwidth, matmul_ceiling
from scripts.gpu.part import Report

MORE_PACKAGES = ("huggingface_hub", "mmengine", "triton", "wandb")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def measure(report: Report, small: bool) -> None:
    found = describe()
    report.add(**{key: found[key] for key in ("commit", "hardware")})
    report.add(versions=found["versions"] | {name: _version(name) for name in MORE_PACKAGES})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        report.add(card=card())
    report.add(
        ceilings={
            str(dtype).removeprefix("torch."): matmul_ceiling(device, dtype)
            for dtype in DTYPES[:: 2 if small else 1]
        },
        bandwidth=copy_bandwidth(device),
    )


def card() -> dict[str, Any]:
    """Name, memory in bytes, compute capability, CUDA and driver of the first card."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    if not (tool := shutil.which("nvidia-smi")):
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
