"""Seconds from typing `vader train vader_demo` to its first output and to its first training step, in an empty folder.

    python scripts/measure_first_minute.py [--vader PATH] [--repeat 3]

Captions are encoded anew each time; the operating system's cache of files is as the machine has it. Prints JSON: the
median of the runs, and each; beside the seconds those of processor time, which a busy machine changes less.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
POLL = 0.05  # seconds


def measure(vader: list[str], folder: Path) -> dict[str, float]:
    """Start a run in ``folder``, and stop it after its first step."""
    environment = os.environ | {"HOME": str(folder)}
    rows = folder / "runs" / "demo" / "metrics.csv"
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    started = time.monotonic()
    command = [*vader, "train", "vader_demo"]
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE) as run:
        assert run.stderr
        run.stderr.read(1)
        first_output = time.monotonic() - started
        while not (rows.is_file() and rows.read_bytes().count(b"\n") > 1):
            if run.poll() is not None:
                raise SystemExit(f"the run ended early: {run.stderr.read().decode()}")
            time.sleep(POLL)
        first_step = time.monotonic() - started
        run.kill()
        run.wait()
    cpu = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
    figures = {"first_output": first_output, "first_step": first_step, "cpu": cpu}
    return {name: round(seconds, 2) for name, seconds in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vader", help="the installed command (default: this checkout's)")
    parser.add_argument("--repeat", type=int, default=3)
    flags = parser.parse_args()
    vader = [flags.vader] if flags.vader else [sys.executable, str(ROOT / "Core" / "__main__.py")]
    runs = []
    for _ in range(flags.repeat):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(measure(vader, Path(folder)))
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    cores = len(os.sched_getaffinity(0))
    print(json.dumps({"median": medians, "runs": runs, "cores": cores, "load": os.getloadavg()[0]}, indent=1))


if __name__ == "__main__":
    main()
