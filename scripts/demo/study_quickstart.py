"""Settings for the quickstart: a search over some, several seeds of those chosen, and longer runs.

``python -m scripts.demo.study_quickstart [--only NAME …] [--pilots] [--write-docs]``

Runs lie in runs/study_quickstart, and what is known of each in docs/studies/quickstart.json; finished ones are not
repeated, and interrupted ones continue. Several of these commands may run at once, with other runs each. The search is
judged on prompts that neither training nor the final comparison uses. ``--pilots`` times a step of each of the search's
settings and nothing else, on a quiet machine. ``--write-docs`` trains nothing: it writes the section of
docs/quickstart.md.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from Core.cli import run
from Core.config import Config, load_config
from Core.evaluation.metrics import dynamic_degree, motion
from Core.utils.files import write_whole
from Core.utils.folder_lock import folder_lock
from scripts.demo import world
from scripts.demo.common import ROOT, to_pixels
from scripts.demo.quickstart import CONFIG
from scripts.demo.study_objectives import (
    HELD_OUT,
    PILOT,
    PILOT_STEPS,
    SEARCH_SEED,
    SIDE_EFFECTS,
    VALIDATED,
    as_table,
    counted,
    course_of,
    held_out,
    in_words,
    validation_prompts,
    validation_scenes,
)
from scripts.pages import with_section

FOLDER = ROOT / "runs" / "study_quickstart"
PAGE = ROOT / "docs" / "quickstart.md"
RESULTS = ROOT / "docs" / "studies" / "quickstart.json"
BEGIN, END = "<!-- study: written by scripts/demo/study_quickstart.py -->", "<!-- end of study -->"
WINDOW = {"backprop_steps": 3, "prefix_steps": None}
SEARCHED_STEPS = 120
# What differs from the quickstart's settings with so many steps.
SEARCH: dict[str, dict[str, Any]] = {
    "the quickstart's": {},
    "one random frame": {"decode_frame": -1, "max_train_steps": 162},
    "gradient of the captions' branch alone": {"guidance_grad": "cond", "max_train_steps": 141},
    "gradient of the captions' branch alone, prefix of 3 steps": {
        "guidance_grad": "cond",
        "prefix_steps": 3,
        "max_train_steps": 156,
    },
    "window of 3, no step left out": {**WINDOW, "max_train_steps": 78},
    "half the rate": {"lr": 5e-4},
    "cosine schedule": {"lr_schedule": "cosine"},
    "twice the rate, cosine schedule": {"lr": 2e-3, "lr_schedule": "cosine"},
    "batch of 4": {"train_batch_size": 4, "max_train_steps": 240},
    "leap, three times the rate": {"objective": "leap", "lr": 3e-3, "max_train_steps": 67},
    "drtune with 4 steps, three times the rate": {
        "objective": "drtune",
        "grad_steps": 4,
        "lr": 3e-3,
        "max_train_steps": 60,
    },
}
SEEDS = (0, 1, 2)
COSINE = {"lr_schedule": "cosine"}
# Kinds of runs with several seeds, by the beginning of their names.
SEEDED: dict[str, dict[str, Any]] = {
    "seed": {},
    "long, seed": COSINE | {"max_train_steps": 600},
    "long, window of 3, seed": COSINE | WINDOW | {"max_train_steps": 500},
}
SEEDS_SAID = f"""Gains on {HELD_OUT} held-out prompts. Motion, dynamic degree and diversity are measured on videos of
other held-out prompts with two seeds each, before and after. A long run is the quickstart with more steps and
`{in_words(COSINE)}`; with a window of 3 also `{in_words(WINDOW)}`."""
FALL = 0.05  # of a measure beside the reward, worth telling
FALL_SAID = """The base model's videos change more from frame to frame than true videos of the same prompts: their
dynamic degree is {:.1f} against {:.1f}, and motion {:.4f} against {:.4f}. So a lower dynamic degree is no loss here,
and more motion no gain."""
SEARCH_SAID = f"""The settings of the config `vader_quickstart`, with {SEARCHED_STEPS} steps, were compared with these,
each trained once and judged on 32 further prompts with two seeds each. Differences of a few points are noise. Seconds
are those of the steps, on one CPU core:"""
RUNS: dict[str, dict[str, Any]] = {
    f"search: {name}": {"max_train_steps": SEARCHED_STEPS, **keys, "seed": SEARCH_SEED}
    for name, keys in SEARCH.items()
}
RUNS |= {f"{kind} {seed}": keys | {"seed": seed} for kind, keys in SEEDED.items() for seed in SEEDS}


def config_of(name: str, **keys: Any) -> Config:
    values = {**RUNS[name], **VALIDATED, "val_prompt_path": validation_prompts(), "checkpointing_steps": 10}
    if steps := values.get("max_train_steps"):
        values["validation_steps"] = -(-steps // 3)
    values |= {"project_dir": FOLDER / name.replace(": ", "_").replace(" ", "_"), "verbose": 0, **keys}
    return load_config(
        [str(CONFIG), *(f"--{key.replace('_', '-')}={value}" for key, value in values.items())]
    )


def read_results() -> dict[str, dict[str, Any]]:
    """What is known of each run."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def keep(name: str, result: Mapping[str, Any]) -> None:
    with folder_lock(FOLDER):
        results = read_results()
        results[name] = results.get(name, {}) | dict(result)
        write_whole(
            RESULTS,
            json.dumps({known: results[known] for known in RUNS if known in results}, indent=1) + "\n",
        )


def measure(names: Sequence[str]) -> None:
    """Train what is not known yet; all but the search is compared on the held-out prompts of the quickstart."""
    for name in names:
        if is_measured(name, read_results().get(name, {})):
            continue
        config = config_of(name)
        result = course_of(folder := run(config), config.optimizer.max_train_steps)
        if not name.startswith("search"):
            result |= held_out(folder)
        keep(name, result)


def is_measured(name: str, result: Mapping[str, Any]) -> bool:
    """Whether a kept result is of as many steps as its run has now."""
    return "steps" in result and result["steps"][-1] == config_of(name).optimizer.max_train_steps


def measure_steps() -> None:
    """Keep the seconds of one core that a step takes with each of the search's settings."""
    for name in RUNS:
        if name.startswith("search"):
            folder = FOLDER / "pilots" / Path(config_of(name).run.project_dir).name
            pilot = config_of(name, **PILOT, max_train_steps=PILOT_STEPS, project_dir=folder)
            keep(name, {"step_seconds": min(counted(pilot).seconds[1:])})


def search_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    header = ["settings", "optimiser steps", "seconds", "reward before", "after"]
    lines = [header]
    for name in SEARCH:
        if "steps" in (course := results.get(f"search: {name}", {})):
            steps, rewards = course["steps"][-1], [f"{course['reward'][place]:.1f}" for place in (0, -1)]
            lines.append([name, str(steps), f"{steps * course['step_seconds']:.0f}", *rewards])
    return as_table(lines)


def seeds_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per seed of the chosen settings and of longer runs, with the mean of those known."""
    header = [
        "run",
        "steps",
        "reward",
        "gap closed",
        "colour and shape right, points",
        "motion right, points",
    ]
    header += [f"{name.replace('_', ' ')}, change" for name in SIDE_EFFECTS]
    lines = [[*header, f"reward when motion, dynamic degree or diversity first fell by {FALL:.0%}"]]
    for kind in SEEDED:
        known = {
            name: results[name]
            for seed in SEEDS
            if is_measured(name := f"{kind} {seed}", results.get(name, {}))
        }
        rows = [row_of(result) for result in known.values()]
        lines += [[name, *said(row), fell_at(known[name])] for name, row in zip(known, rows, strict=True)]
        if len(rows) > 1:
            lines.append(
                [
                    f"mean of {len(rows)}",
                    *said([statistics.mean(column) for column in zip(*rows, strict=True)]),
                    "",
                ]
            )
    return as_table(lines)


def row_of(result: Mapping[str, Any]) -> list[float]:
    gains = [result["held_out"][name]["gain"] for name in ("reward", "colour_and_shape", "direction")]
    changes = [result[name][-1] / result[name][0] - 1 for name in SIDE_EFFECTS]
    return [result["steps"][-1], gains[0], result["share_of_gap"], *gains[1:], *changes]


def fell_at(result: Mapping[str, Any]) -> str:
    """Reward of the first validation at which something beside it had fallen by ``FALL``."""
    for place, reward in enumerate(result["reward"]):
        if any(result[name][place] < (1 - FALL) * result[name][0] for name in SIDE_EFFECTS):
            return f"{reward:.1f}"
    return "–"


def true_videos() -> tuple[float, float]:
    """Mean dynamic degree and motion of the true videos of the prompts that courses are judged on."""
    scenes, _ = validation_scenes()
    videos = to_pixels(np.stack([world.render(scene) for scene in scenes])).transpose(1, 2)
    return statistics.mean(dynamic_degree(video[None]) for video in videos), motion(videos).mean().item()


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
    (flow, change), base = true_videos(), results["seed 0"]
    fall = FALL_SAID.format(base["dynamic_degree"][0], flow, base["motion"][0], change)
    parts = ["## Several seeds, and longer runs", SEEDS_SAID, seeds_table(results), fall]
    parts += [SEARCH_SAID, search_table(results)]
    write_whole(PAGE, with_section(PAGE.read_text(encoding="utf-8"), BEGIN, END, parts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--pilots", action="store_true", help="time a step of each of the search's settings")
    parser.add_argument("--write-docs", action="store_true", help="train nothing, write the page")
    args = parser.parse_args()
    if args.write_docs:
        return write_docs()
    torch.set_num_threads(1)
    if args.pilots:
        return measure_steps()
    return measure(args.only)


if __name__ == "__main__":
    main()
