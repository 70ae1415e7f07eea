"""Find the setting that learns most in equal time: held-out reward against wall time on the demo, over several seeds.

``python -m scripts.demo.study_windows [--seconds 100] [--seeds 0 1 2] [--only NAME …] [--write-docs]``

Trains every setting with every seed for about ``--seconds`` seconds, one thread each, in runs/study_windows, resuming
interrupted runs. ``--write-docs`` trains nothing: it writes docs/learning-study.md, its table and its plot from the
runs and from the pilots, which measure the time of a step. Times are comparable only if every run had a core to itself.
"""

import argparse
import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from Core.cli import run
from Core.config import load_config
from Core.config.files import read_run
from Core.utils.environment import read_starts
from Core.utils.tables import read_table
from scripts.demo.common import DEMO, ROOT

FOLDER = ROOT / "runs" / "study_windows"
PAGE = ROOT / "docs" / "learning-study.md"
TABLE, PLOT = (ROOT / "docs" / "benchmarks" / f"learning-study.{kind}" for kind in ("csv", "svg"))
CONFIG = load_config([str(DEMO)])
SAMPLING_STEPS = CONFIG.backbone.num_sampling_steps(CONFIG.family)
GRADIENT_STEPS = CONFIG.flat()["backprop_steps"]
WINDOWS: dict[str, dict[str, Any]] = {
    "window 1": {"backprop_steps": 1},
    "window 3": {"backprop_steps": 3},
    "window 5": {"backprop_steps": 5},
    "rand": {"backprop_mode": "rand"},
    "full": {"backprop_steps": SAMPLING_STEPS},
}
GUARDS: dict[str, dict[str, Any]] = {f"kl {weight:g}": {"kl_weight": weight} for weight in (0.3, 1.0, 10.0)}
SETTINGS = WINDOWS | GUARDS
DEFAULT = f"window {GRADIENT_STEPS}"
PILOT_STEPS = 8
MEASURES = ("reward", "motion", "diversity")
VALIDATIONS = 2  # besides the one before the first step
# 48 prompts with two seeds each, so that diversity is measured.
VALIDATED = {"num_val_runs": 3, "val_batch_size": 16, "num_val_seeds": 2}


def train(setting: str, folder: Path, steps: int, **flags: Any) -> None:
    """Train one run to its end; a finished run is only loaded."""
    values = {"max_train_steps": steps, "checkpointing_steps": 5, "project_dir": str(folder), "verbose": 0}
    values |= {**flags, **SETTINGS[setting]}
    run(load_config([str(DEMO), *(f"--{key.replace('_', '-')}={value}" for key, value in values.items())]))


def pilot_of(setting: str) -> Path:
    return FOLDER / "pilots" / setting.replace(" ", "_")


def step_seconds(setting: str) -> float:
    """Seconds per optimiser step, from the setting's pilot."""
    return statistics.mean(row["seconds"] for row in read_table(pilot_of(setting) / "metrics.csv")[1:])


def folder_of(setting: str, seed: int) -> Path:
    return FOLDER / f"{setting.replace(' ', '_')}_seed_{seed}"


def course(setting: str, seed: int) -> dict[str, np.ndarray] | None:
    """Steps and held-out values at each validation; None for an unfinished run."""
    folder = folder_of(setting, seed)
    if not (folder / "validation.csv").is_file():
        return None
    table = read_table(folder / "validation.csv")
    steps = np.array([int(row["step"]) for row in table])
    if steps[-1] != read_run(folder)["max_train_steps"]:
        return None
    return {name: np.array([row[name] for row in table]) for name in MEASURES} | {"steps": steps}


def table_of(
    courses: dict[str, list[dict[str, np.ndarray]]], seconds: dict[str, float]
) -> tuple[float, list[dict[str, Any]]]:
    """The training time that every run reached, and one row per setting interpolated to that time.

    Args:
        seconds: seconds per step, by setting.
    """
    budget = min(float(c["steps"][-1]) * seconds[name] for name, runs in courses.items() for c in runs)
    rows = []
    for setting, runs in courses.items():
        steps = budget / seconds[setting]
        gains = {
            name: [float(np.interp(steps, c["steps"], c[name]) - c[name][0]) for c in runs]
            for name in MEASURES
        }
        row = {
            "setting": setting,
            "seeds": len(runs),
            "step_seconds": seconds[setting],
            "steps": round(steps),
        }
        row |= {"reward_gain": statistics.mean(gains["reward"])}
        row |= {"lowest": min(gains["reward"]), "highest": max(gains["reward"])}
        for name in ("motion", "diversity"):
            row[f"{name}_gain"] = statistics.mean(gains[name])
            row[f"{name}_before"] = statistics.mean(float(c[name][0]) for c in runs)
        rows.append(row)
    return budget, sorted(rows, key=lambda row: -row["reward_gain"])


def write_docs(seeds: Sequence[int]) -> None:
    """Write docs/learning-study.md, its table as CSV, and its plot."""
    found = {name: [c for seed in seeds if (c := course(name, seed))] for name in SETTINGS}
    found = {name: runs for name, runs in found.items() if runs}
    seconds = {name: step_seconds(name) for name in found}
    budget, rows = table_of(found, seconds)
    with open(TABLE, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    plot({name: runs for name, runs in found.items() if name in WINDOWS}, seconds)
    name = next(iter(found))
    first = next(folder for seed in seeds if (folder := folder_of(name, seed)).is_dir())
    PAGE.write_text(page(budget, rows, read_starts(first)[0]["hardware"]["cpu"]), encoding="utf-8")


def page(budget: float, rows: Sequence[dict[str, Any]], cpu: str) -> str:
    windows = [row for row in rows if row["setting"] in WINDOWS]
    guarded = [row for row in rows if row["setting"] in (*GUARDS, DEFAULT)]
    return f"""# Learning study

Generated by `python -m scripts.demo.study_windows --write-docs` from runs of the same script; the numbers are in
[learning-study.csv](benchmarks/learning-study.csv).

Every run trains the demo's adapter with the settings of `vader_demo.py` except those named, on one thread of {cpu}.
Reward, motion and diversity are measured on 48 held-out prompts with two seeds each, before, halfway and at the end.
The tables show their change after {budget:.0f} seconds of optimiser steps, interpolated linearly between measurements
and averaged over the seeds. Training time is the number of steps times the time of a step, taken from a run of
{PILOT_STEPS} steps per setting. Motion and diversity are in hundredths of the pixel scale [-1, 1]; brackets give the
change relative to the base model.

## Windows

The demo has {SAMPLING_STEPS} sampling steps. `window K` keeps gradients for the last K steps,
`full` for all, `rand` from a randomly drawn step onwards. `noise repeats R` repeated the last step R times with fresh
noise; the option was removed because it learned less in equal time.

{as_table(windows)}

![Held-out reward against seconds of training](benchmarks/learning-study.svg)

{conclusion(windows)}

## The distance to the base model

`kl X` is the demo's default (`backprop_steps={GRADIENT_STEPS}`) with `kl_weight=X`.

{as_table(guarded)}

{kept(guarded)}
"""


def conclusion(windows: Sequence[dict[str, Any]]) -> str:
    """Say whether the demo's default learned most."""
    best = windows[0]
    own = next(row for row in windows if row["setting"] == DEFAULT)
    equals = [row["setting"] for row in windows[1:] if row["highest"] >= best["lowest"]]
    same = (
        f"; the range of its seeds overlaps those of {', '.join(f'`{name}`' for name in equals)}"
        if equals
        else ""
    )
    found = f"`{best['setting']}` has the highest mean{same}. `vader_demo.py` uses `{DEFAULT}`"
    if best is own or DEFAULT not in equals:
        return f"{found}."
    return f"{found}: the two cannot be told apart here, and a smaller window needs less memory."


def kept(rows: Sequence[dict[str, Any]]) -> str:
    """The share of the gain that each ``kl_weight`` keeps."""
    own = next(row for row in rows if row["setting"] == DEFAULT)
    shares = [
        f"`{row['setting']}` {row['reward_gain'] / own['reward_gain']:.0%}" for row in rows if row is not own
    ]
    return f"Share of the gain kept in equal time: {', '.join(shares)}."


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "setting",
        "seeds",
        "seconds a step",
        "steps",
        "reward gain",
        "lowest to highest",
        "motion",
        "diversity",
    ]
    lines = [
        [
            row["setting"],
            row["seeds"],
            f"{row['step_seconds']:.2f}",
            row["steps"],
            f"{row['reward_gain']:+.1f}",
            f"{row['lowest']:+.1f} to {row['highest']:+.1f}",
            *(
                f"{100 * row[n + '_gain']:+.2f} ({row[n + '_gain'] / row[n + '_before']:+.1%})"
                for n in MEASURES[1:]
            ),
        ]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, ["---"] * 8, *lines])


def plot(found: dict[str, list[dict[str, np.ndarray]]], seconds: dict[str, float]) -> None:
    """Plot held-out reward against training seconds: one line per setting, with the range over seeds shaded."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "study", "figure.constrained_layout.use": True, "font.size": 9}):
        figure = Figure(figsize=(7, 4))
        axes = figure.add_subplot()
        for name, runs in found.items():
            grid = np.linspace(0, min(float(c["steps"][-1]) for c in runs), 50)
            gains = np.stack([np.interp(grid, c["steps"], c["reward"] - c["reward"][0]) for c in runs])
            axes.plot(seconds[name] * grid, gains.mean(0), label=name)
            axes.fill_between(seconds[name] * grid, gains.min(0), gains.max(0), alpha=0.1)
        axes.set(xlabel="seconds of training", ylabel="held-out reward, change since step 0")
        axes.legend(frameon=False)
        figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=100, help="training seconds per run (default 100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--write-docs", action="store_true", help="train nothing, write the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Seed by seed, so that an interrupted study has some seeds complete.
    for seed in [] if args.write_docs else args.seeds:
        for setting in args.only:
            train(setting, pilot_of(setting), PILOT_STEPS, num_val_runs=1, val_batch_size=1)
            steps = max(VALIDATIONS, round(args.seconds / step_seconds(setting)))
            every = -(-steps // VALIDATIONS)
            train(setting, folder_of(setting, seed), steps, validation_steps=every, seed=seed, **VALIDATED)
            if course(setting, seed) is None:
                raise SystemExit("stopped; the same command continues")
    if args.write_docs:
        write_docs(args.seeds)


if __name__ == "__main__":
    main()
