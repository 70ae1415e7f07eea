"""Measure scaling to two processes: measure_scaling.py CONFIG [--steps 8] [--rounds 3] [--json FILE] [flags].

Trains the same global batch alternately with one process doing two backward passes and with two processes doing one
each, at one thread per process. Efficiency is half the ratio of their seconds per optimiser step: 100% if two processes
take half the time.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.utils.tables import read_table  # noqa: E402
from scripts.bench import page  # noqa: E402
from scripts.benchmark import origin  # noqa: E402

LAUNCH = ROOT / "Open-Sora" / "script" / "run_text2video_train.sh"
WARM_UP = 2


def train(config: str, processes: int, steps: int, flags: list[str]) -> dict[str, float]:
    """Median seconds per step and share spent averaging gradients, over ``steps`` steps after the first two."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"gradient_accumulation_steps": 2 // processes, "max_train_steps": WARM_UP + steps}
        values |= {"num_val_runs": 1, "val_batch_size": 1, "checkpointing_steps": 10**6, "verbose": 0}
        own = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
        environment = os.environ | {"NUM_PROCESSES": str(processes), "OMP_NUM_THREADS": "1"}
        command = ["sh", str(LAUNCH), config, "--project-dir", folder, *flags, *own]
        subprocess.run(command, check=True, env=environment | {"PYTHON": sys.executable})
        rows = read_table(Path(folder) / "metrics.csv")[WARM_UP:]
    return {key: statistics.median(row[key] for row in rows) for key in ("seconds", "all_reduce_share")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps per run (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default 3)")
    parser.add_argument("--json", type=Path, help="also write the result there")
    own, flags = parser.parse_known_args()
    config = str(Path(own.config).resolve())
    rounds = [
        {n: train(config, n, own.steps, flags) for n in ((1, 2) if number % 2 else (2, 1))}
        for number in range(own.rounds)
    ]
    result = {
        "preset": Path(config).stem,
        "threads": 1,
        "kind": "scaling",
        "one": [r[1] for r in rounds],
        "two": [r[2] for r in rounds],
        **origin(sys.argv[1:], "scripts/measure_scaling.py"),
    }
    page.deliver(result, own.json)


if __name__ == "__main__":
    main()
