"""Which gradient window learns most in the same time: reward against wall time on the demo, over several seeds.

``python -m scripts.demo.study_windows [--steps 60] [--seeds 0 1 2] [--only NAME …] [--table]``: trains every setting
from every seed into runs/study_windows, continuing what was interrupted, then writes study_windows.csv and .png there.
``--table`` only writes. Times are only comparable when nothing else runs on the machine.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch

from Core.config import load_config
from Core.run import run
from Core.tracking import read_table
from scripts.demo.common import ROOT
from scripts.demo.quickstart import CONFIG

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FOLDER = ROOT / "runs" / "study_windows"
ALL_STEPS = load_config([str(CONFIG)]).scheduler["num_sampling_steps"]
SETTINGS = {
    "window 1": {"backprop_steps": 1},
    "window 3": {"backprop_steps": 3},
    "window 5": {"backprop_steps": 5},
    "rand": {"backprop_mode": "rand"},
    "full": {"backprop_steps": ALL_STEPS},
    "noise repeats 2": {"backprop_steps": 1, "noise_repeats": 2},
    "noise repeats 4": {"backprop_steps": 1, "noise_repeats": 4},
    "kl 0.1": {"backprop_steps": 1, "kl_weight": 0.1},
    "kl 1": {"backprop_steps": 1, "kl_weight": 1.0},
    "kl 10": {"backprop_steps": 1, "kl_weight": 10.0},
}
VALUES = ("reward", "motion", "diversity")


def folder_of(setting: str, seed: int) -> Path:
    return FOLDER / f"{setting.replace(' ', '_')}_seed_{seed}"


def train(setting: str, seed: int, steps: int) -> None:
    """Train one run to its end; one that is finished costs loading only."""
    fixed = {"max_train_steps": steps, "validation_steps": max(1, steps // 6), "checkpointing_steps": 5}
    fixed |= {"num_val_seeds": 2, "project_dir": str(folder_of(setting, seed)), "seed": seed, "verbose": 0}
    flags = {**fixed, **SETTINGS[setting]}
    run(load_config([str(CONFIG), *(f"--{key.replace('_', '-')}={value}" for key, value in flags.items())]))


def course(setting: str, seed: int) -> dict[str, np.ndarray] | None:
    """Seconds of training and held-out values at each validation; None before the run's first two."""
    folder = folder_of(setting, seed)
    if not (folder / "validation.csv").is_file() or not (folder / "metrics.csv").is_file():
        return None
    spent = np.concatenate([[0.0], np.cumsum([row["seconds"] for row in read_table(folder / "metrics.csv")])])
    table = read_table(folder / "validation.csv")
    if len(table) < 2:
        return None
    made = {name: np.array([row[name] for row in table]) for name in VALUES}
    return made | {"seconds": spent[[int(row["step"]) for row in table]]}


def summarise(courses: Sequence[dict[str, np.ndarray]], budget: float) -> dict[str, float]:
    """Mean over seeds of each value's change after ``budget`` seconds, and the spread of the reward's."""
    at_budget = {
        name: [float(np.interp(budget, c["seconds"], c[name]) - c[name][0]) for c in courses]
        for name in VALUES
    }
    row = {f"{name} gain": statistics.mean(gains) for name, gains in at_budget.items()}
    row["reward gain, standard deviation"] = statistics.pstdev(at_budget["reward"])
    for name in ("motion", "diversity"):
        row[f"{name} at first"] = statistics.mean(float(c[name][0]) for c in courses)
    row["reward gain at the end"] = statistics.mean(float(c["reward"][-1] - c["reward"][0]) for c in courses)
    row["seconds to the end"] = statistics.mean(float(c["seconds"][-1]) for c in courses)
    return row


def write_results(seeds: Sequence[int]) -> None:
    """The table, at the time that the quickest setting needs to its end, and the plot."""
    found = {name: [c for seed in seeds if (c := course(name, seed))] for name in SETTINGS}
    found = {name: courses for name, courses in found.items() if courses}
    if not found:
        raise SystemExit("no run has two validations yet; train first")
    budget = min(float(c["seconds"][-1]) for courses in found.values() for c in courses)
    rows = [
        {"setting": name, "seeds": len(courses), "seconds": round(budget, 1)}
        | {key: round(value, 5) for key, value in summarise(courses, budget).items()}
        for name, courses in found.items()
    ]
    with open(FOLDER / "study_windows.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in sorted(rows, key=lambda row: -row["reward gain"]):
        print(
            f"{row['setting']:>16} {row['reward gain']:+.4f} ± {row['reward gain, standard deviation']:.4f}"
        )
    plot(found)


def plot(found: dict[str, list[dict[str, np.ndarray]]]) -> None:
    """Held-out reward against seconds of training: a line per setting, its seeds' range shaded."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, courses in found.items():
        grid = np.linspace(0, min(float(c["seconds"][-1]) for c in courses), 50)
        gains = np.stack([np.interp(grid, c["seconds"], c["reward"] - c["reward"][0]) for c in courses])
        axes.plot(grid, gains.mean(0), label=f"{name} ({len(courses)} seeds)")
        axes.fill_between(grid, gains.min(0), gains.max(0), alpha=0.15)
    axes.set(xlabel="seconds of training", ylabel="held-out reward, change since step 0")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(FOLDER / "study_windows.png", dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--table", action="store_true", help="train nothing, write table and plot")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    # Seed by seed, so that an interrupted study has all settings of some seeds.
    for seed in [] if args.table else args.seeds:
        for setting in args.only:
            train(setting, seed, args.steps)
    write_results(args.seeds)


if __name__ == "__main__":
    main()
