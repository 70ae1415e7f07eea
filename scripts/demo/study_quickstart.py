"""Settings for the quickstart: a search over some, several seeds of those chosen, and a longer run.

``python -m scripts.demo.study_quickstart [--only NAME …] [--write-docs]``

Runs lie in runs/study_quickstart, and what is known of each in docs/studies/quickstart.json; finished ones are not
repeated, and interrupted ones continue. Several of these commands may run at once, with other runs each. The search is
judged on prompts that neither training nor the final comparison uses. ``--write-docs`` trains nothing: it writes the
section of docs/quickstart.md.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from Core.cli import run
from Core.config import Config, load_config
from Core.utils.files import write_whole
from Core.utils.folder_lock import folder_lock
from Core.utils.tables import read_table
from scripts.demo.common import ROOT
from scripts.demo.compare import HeldOut
from scripts.demo.quickstart import CONFIG
from scripts.demo.study_objectives import (
    HELD_OUT,
    MEASURES,
    SEARCH_SEED,
    SIDE_EFFECTS,
    VALIDATED,
    as_table,
    validation_prompts,
)

FOLDER = ROOT / "runs" / "study_quickstart"
PAGE = ROOT / "docs" / "quickstart.md"
RESULTS = ROOT / "docs" / "studies" / "quickstart.json"
BEGIN, END = "<!-- study: written by scripts/demo/study_quickstart.py -->", "<!-- end of study -->"
# What differs from the quickstart's settings; each takes as many seconds as these with 120 steps.
SEARCH: dict[str, dict[str, Any]] = {
    "the quickstart's": {},
    "one random frame": {"decode_frame": -1, "max_train_steps": 162, "validation_steps": 54},
    "gradient of the captions' branch alone": {
        "guidance_grad": "cond",
        "max_train_steps": 141,
        "validation_steps": 47,
    },
    "three steps stand for eleven": {"prefix_steps": 3, "max_train_steps": 129, "validation_steps": 43},
    "both": {
        "guidance_grad": "cond",
        "prefix_steps": 3,
        "max_train_steps": 156,
        "validation_steps": 52,
    },
    "window of 3, no step left out": {
        "backprop_steps": 3,
        "prefix_steps": None,
        "max_train_steps": 78,
        "validation_steps": 26,
    },
    "half the rate": {"lr": 5e-4},
    "cosine schedule": {"lr_schedule": "cosine"},
    "twice the rate, cosine schedule": {"lr": 2e-3, "lr_schedule": "cosine"},
    "batch of 4": {"train_batch_size": 4, "max_train_steps": 240, "validation_steps": 80},
    "leap, three times the rate": {
        "objective": "leap",
        "lr": 3e-3,
        "max_train_steps": 67,
        "validation_steps": 22,
    },
    "drtune with 4 steps, three times the rate": {
        "objective": "drtune",
        "grad_steps": 4,
        "lr": 3e-3,
        "max_train_steps": 60,
        "validation_steps": 20,
    },
}
SEEDS = (0, 1, 2)
LONG_STEPS = 600
LONG = {"max_train_steps": LONG_STEPS, "lr_schedule": "cosine"}
RUNS: dict[str, dict[str, Any]] = {
    f"search: {name}": keys | {"seed": SEARCH_SEED} for name, keys in SEARCH.items()
}
RUNS |= {f"seed {seed}": {"seed": seed} for seed in SEEDS}
RUNS |= {f"long, seed {seed}": LONG | {"seed": seed} for seed in SEEDS}


def config_of(name: str) -> Config:
    values = {"validation_steps": LONG_STEPS // 4 if name.startswith("long") else 40, **RUNS[name]}
    values |= {**VALIDATED, "val_prompt_path": validation_prompts(), "checkpointing_steps": 10}
    values |= {"project_dir": FOLDER / name.replace(": ", "_").replace(" ", "_"), "verbose": 0}
    return load_config(
        [str(CONFIG), *(f"--{key.replace('_', '-')}={value}" for key, value in values.items())]
    )


def read_results() -> dict[str, dict[str, Any]]:
    """What is known of each run."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def keep(name: str, result: Mapping[str, Any]) -> None:
    with folder_lock(FOLDER):
        results = read_results() | {name: result}
        write_whole(
            RESULTS,
            json.dumps({known: results[known] for known in RUNS if known in results}, indent=1) + "\n",
        )


def train(run_name: str) -> dict[str, Any]:
    """The course of a run on the validation prompts, by measure."""
    config = config_of(run_name)
    folder = run(config)
    table = read_table(folder / "validation.csv")
    if int(table[-1]["step"]) != config.optimizer.max_train_steps:
        raise SystemExit("stopped; the same command continues")
    course = {name: [row[name] for row in table] for name in ("reward", *SIDE_EFFECTS)}
    return {"steps": [int(row["step"]) for row in table]} | course


def measure(names: Sequence[str]) -> None:
    """Train what is not known yet; all but the search is compared on the held-out prompts of the quickstart."""
    held_out = None
    for name in names:
        if name in read_results():
            continue
        result = train(name)
        if not name.startswith("search"):
            held_out = held_out or HeldOut(config_of(name), HELD_OUT)
            found = held_out.compare(str(Path(config_of(name).run.project_dir) / "adapter"))
            result["held_out"] = {measure: vars(found.gain(measure)) for measure in MEASURES}
            result["share_of_gap"] = found.share_of_distance
        keep(name, result)


def search_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    header = ["settings", "optimiser steps", "reward before", "after"]
    lines = [header]
    for name in SEARCH:
        if course := results.get(f"search: {name}"):
            rewards = [f"{course['reward'][place]:.1f}" for place in (0, -1)]
            lines.append([name, str(course["steps"][-1]), *rewards])
    return as_table(lines)


def seeds_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per seed of the chosen settings and of the longer run, with means of three."""
    header = [
        "run",
        "steps",
        "reward",
        "gap closed",
        "colour and shape right, points",
        "motion right, points",
    ]
    header += [f"{name.replace('_', ' ')}, change" for name in SIDE_EFFECTS]
    lines = [header]
    for prefix in ("seed", "long, seed"):
        known = {name: results[name] for seed in SEEDS if (name := f"{prefix} {seed}") in results}
        rows = [row_of(result) for result in known.values()]
        lines += [[name, *said(row)] for name, row in zip(known, rows, strict=True)]
        if len(rows) > 1:
            lines.append(
                [
                    f"mean of {len(rows)}",
                    *said([statistics.mean(column) for column in zip(*rows, strict=True)]),
                ]
            )
    return as_table(lines)


def row_of(result: Mapping[str, Any]) -> list[float]:
    gains = [result["held_out"][name]["gain"] for name in ("reward", "colour_and_shape", "direction")]
    changes = [result[name][-1] / result[name][0] - 1 for name in SIDE_EFFECTS]
    return [result["steps"][-1], gains[0], result["share_of_gap"], *gains[1:], *changes]


def said(row: Sequence[float]) -> list[str]:
    steps, reward, share, content, direction, *changes = row
    shown = [
        f"{steps:.0f}",
        f"{reward:+.1f}",
        f"{share:.0%}",
        f"{100 * content:+.1f}",
        f"{100 * direction:+.1f}",
    ]
    return [*shown, *(f"{change:+.1%}" for change in changes)]


def write_docs() -> None:
    """Put the study's section into docs/quickstart.md."""
    results = read_results()
    section = "\n\n".join(
        [
            BEGIN,
            "## Several seeds, and a longer run",
            f"Gains on {HELD_OUT} held-out prompts. Motion, dynamic degree and diversity are measured on videos of\n"
            "other held-out prompts with two seeds each, before and after. The long run is the quickstart with\n"
            f"`--max-train-steps {LONG_STEPS} --lr-schedule cosine`.",
            seeds_table(results),
            "The settings of the config `vader_quickstart` were compared with these, each trained once and judged on\n"
            "32 further prompts with two seeds each:",
            search_table(results),
            END,
        ]
    )
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2] or "\n"
    write_whole(PAGE, f"{head.rstrip()}\n\n{section}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--write-docs", action="store_true", help="train nothing, write the page")
    args = parser.parse_args()
    if args.write_docs:
        return write_docs()
    torch.set_num_threads(1)
    return measure(args.only)


if __name__ == "__main__":
    main()
