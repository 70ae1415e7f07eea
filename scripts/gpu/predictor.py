"""Predicted peaks of the configurations that the other parts measure, by scripts/estimate.py."""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from scripts.gpu.part import Report

ROOT = Path(__file__).resolve().parents[2]
ESTIMATE = ROOT / "scripts" / "estimate.py"
OPENSORA = ROOT / "Open-Sora" / "configs" / "opensora-v1-2" / "vader" / "vader_train.py"
WAN = ROOT / "configs" / "wan"
# Part that measures it → the configuration, and the keys in which the measured step differs from it.
COMPARED: dict[str, tuple[Path, dict[str, Any]]] = {
    "phases": (OPENSORA, {"resolution": "240p"}),
    "360p": (OPENSORA, {"resolution": "360p"}),
    "720p": (OPENSORA, {"resolution": "720p"}),
    "nf4": (OPENSORA, {"base_quant": "nf4"}),
    "fp8": (OPENSORA, {"dtype": "fp8"}),
    "wan-1.3b": (WAN / "t2v_1_3b.py", {"num_sampling_steps": 4}),
    "wan-ti2v-5b": (WAN / "ti2v_5b.py", {"resolution": "480p", "num_sampling_steps": 4}),
}

OUTSIDE_STEPS = ("text", "load", "validation")  # phases that the other parts do not measure


def step_peak(estimate: dict[str, Any]) -> int | None:
    """Peak bytes of a training step; None where the estimate failed."""
    phases = estimate.get("phases", {})
    return max(
        (phase["peak_bytes"] for name, phase in phases.items() if name not in OUTSIDE_STEPS), default=None
    )


def compare(report: Report, small: bool) -> None:
    """What the predictor says of each, several at a time, since each keeps one core busy."""
    if not ESTIMATE.exists():
        report.add(missing="scripts/estimate.py is not there")
        return
    names = list(COMPARED)[: 1 if small else None]
    predictions: dict[str, Any] = {}
    with ThreadPoolExecutor(max(len(os.sched_getaffinity(0)) // 2, 1)) as pool:
        running = {pool.submit(estimate, *COMPARED[name]): name for name in names}
        for done in as_completed(running):
            predictions[running[done]] = done.result()
            report.add(predictions=predictions)


def estimate(base: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The predictor's JSON, or an ``error``."""
    values = {"gradient_accumulation_steps": 1, **changes}
    with tempfile.TemporaryDirectory() as folder:
        config, file = Path(folder) / "config.py", Path(folder) / "estimate.json"
        lines = [f"_base_ = [{str(base)!r}]", *(f"{key} = {value!r}" for key, value in values.items())]
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [sys.executable, str(ESTIMATE), str(config), "--json", str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode or not file.exists():
            return {"error": (done.stderr.strip().splitlines() or ["no JSON"])[-1]}
        return json.loads(file.read_text(encoding="utf-8"))
