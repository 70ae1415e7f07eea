"""Compare the objectives on the demo: each tuned at equal cost, then several seeds, judged on held-out prompts.

``python -m scripts.demo.study_objectives [--pilots] [--reward pick_score] [--seeds 0 1 2] [--long 3200]
[--only NAME …] [--write-docs]``

Every objective first tries its own settings (``TRIALS``) with one seed of its own; the one with the highest validation
reward is then trained with every seed. Another reward than ``SEARCHED`` takes the settings found with that one. A run
takes the same number of seconds of optimiser steps as others, by the time of a step that a pilot of its own process
measured, together with its reward queries, network evaluations and peak memory. Runs lie in runs/study_objectives, and
what is known of each in docs/studies/objectives.json; finished ones are not repeated, and interrupted ones continue.
Several of these commands may run at once, with other objectives each.

``--long 3200`` trains those without a gradient for so many reward queries instead, at a rate that lasts
(``LASTING_RATE``), to see after how many of them an objective reaches a reward. More queries later continue such a run.
With ``--only leap`` it trains that one, with the settings of its other runs.
``--pilots`` measures the cost of every step and nothing else: run it alone on a quiet machine, first. ``--write-docs``
trains nothing: it writes the tables, the CSV of the first and the figure of docs/objectives.md.
"""

import argparse
import csv
import dataclasses
import functools
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from Core.cli import run
from Core.config import Config, load_config
from Core.training.trainer import Trainer
from Core.utils.files import write_whole
from Core.utils.folder_lock import folder_lock
from Core.utils.tables import read_table
from scripts.demo import world
from scripts.demo.common import DEMO, ROOT, heldout
from scripts.demo.compare import HeldOut
from scripts.pages import with_section

FOLDER = ROOT / "runs" / "study_objectives"
PAGE = ROOT / "docs" / "objectives.md"
RESULTS, TABLE, PLOT = (ROOT / "docs" / "studies" / f"objectives.{kind}" for kind in ("json", "csv", "svg"))
BEGIN, END = "<!-- study: written by scripts/demo/study_objectives.py -->", "<!-- end of study -->"
ORACLE = str(ROOT / "scripts" / "demo" / "oracle_reward.py") + ":Oracle"
REWARDS: dict[str, dict[str, Any]] = {
    "pick_score": {},
    "oracle": {"reward_fn": ORACLE, "reward_args": {}, "decode_frame": "video"},
}
SEARCHED = "pick_score"  # the reward that settings are chosen with
RATES = (3e-4, 1e-3, 3e-3)
WINDOWS = ({"prefix_steps": 4, "backprop_steps": 1}, {"backprop_steps": 3})
# As many trials of each, so that each was tuned at the same cost.
TRIALS: dict[str, list[dict[str, Any]]] = {
    "reward_gradient": [{**window, "lr": lr} for window in WINDOWS for lr in RATES],
    "leap": [{"nested_grad": share, "lr": lr} for share in (0.3, 1.0) for lr in RATES],
    "drtune": [{"grad_steps": steps, "lr": lr} for steps in (2, 4) for lr in RATES],
    "direct_align": [{"align_width": width, "lr": lr} for width in (0.1, 0.3) for lr in RATES],
    "grpo": [
        {"group_size": size, "grad_steps": steps, "lr": lr}
        for size, steps in ((8, 4), (16, 2))
        for lr in RATES
    ],
    "nft": [{"group_size": size, "lr": lr, "guided_sampling": True} for size in (8, 16) for lr in RATES],
    "dpo": [{"group_size": size, "lr": lr} for size in (8, 16) for lr in RATES],
}
GRADIENT_FREE = ("grpo", "nft", "dpo")
# What all of them train and score.
COMMON = {"lora_targets": '["qkv", "q_linear", "kv_linear", "proj", "fc1", "fc2"]', "decode_frame": "fml"}
SEARCH_SEED = 1000
SEARCH_SECONDS, TRAINING_SECONDS = 60, 100  # of a run, in optimiser steps
VALIDATION_SEED = 12  # of the scenes that searches and courses are judged on
PILOT_STEPS = 8  # the quickest counts, since other processes slow the rest
PILOT = {"resume": "never", "num_val_runs": 1, "val_batch_size": 1}
VALIDATIONS = {"search": 1, "seed": 4}  # besides the one before the first step
VALIDATED_QUERIES = 400  # between validations of a long run, which may be continued
VALIDATED = {"num_val_runs": 2, "val_batch_size": 16, "num_val_seeds": 2}
HELD_OUT = 256  # prompts of the final comparison
SIDE_EFFECTS = ("motion", "dynamic_degree", "diversity")
LASTING_RATE = 1e-3  # the highest in long runs: at 3e-3 one seed of three of nft, and one of grpo, fell again
QUERIES = (80, 160, 320, 500)  # of the best objective with a gradient, whose gains the others have to reach
MEASURES = ("reward", "colour", "shape", "colour_and_shape", "direction", "motion")
GAINS = f"""Each objective was tuned first: six settings, {SEARCH_SECONDS} seconds of training each. The best one was
then trained for {TRAINING_SECONDS} seconds with each of several seeds. Seconds are of one CPU core. A setting is
judged by one run on 32 prompts, where differences of a few points are noise, and 0.003 is the highest rate tried.

Mean gains on {HELD_OUT} held-out prompts: in PickScore, which was trained, and in points of the share of videos whose
colour, shape and direction of motion match the caption. `gap closed` is the gain as a share of the gap to true
videos. The last three columns are relative changes, on 32 other prompts:"""
COSTS = """What each cost. A network evaluation is one video through the denoiser, in one branch of guidance; one with a
graph counts three, without what is recomputed. Seconds are steps times the quickest of seven timed ones, peak GB
those of the whole process:"""

FIGURE = "Reward against queries and seconds, range of the seeds shaded; without a gradient, of the long runs"
RATIOS = """Each column names a number of reward queries and the gain that `{}` reaches with them on the 32 prompts.
Each cell says, for each seed, how many times as many queries the objective needed for the same gain; `> n`: not reached
with n times as many."""
LONGER = f"""Longer runs. Those without a gradient take the best setting with a rate of {LASTING_RATE:g} or less.
`trained reward` is measured on the 32 prompts, the other gains as above:"""
WITH_ORACLE = """The same settings trained with a reward that has no gradient: the share of colour, shape and direction
of motion that the demo's oracle finds right."""


@dataclass
class Counter:
    """What the training steps of this process asked of the networks.

    evaluations: of the denoiser, by video and guidance branch; one with a graph counts three, for its backward pass.
    queries: videos that the reward scored.
    seconds: each step's, of one core's work, so that other processes do not count.
    """

    evaluations: int = 0
    queries: int = 0
    seconds: list[float] = field(default_factory=list)

    def counted(self, step):
        """``Trainer.train_step`` that counts."""

        def train_step(trainer: Trainer):
            hooks = [
                trainer.backbone.denoiser.register_forward_pre_hook(self.evaluated),
                trainer.objective.reward.register_forward_pre_hook(self.queried),
            ]
            start = time.process_time()
            metrics = step(trainer)
            self.seconds.append(time.process_time() - start)
            for hook in hooks:
                hook.remove()
            return metrics

        return train_step

    def evaluated(self, module, args) -> None:
        self.evaluations += len(args[0]) * (3 if torch.is_grad_enabled() else 1)

    def queried(self, module, args) -> None:
        self.queries += len(args[0])


@dataclass(frozen=True)
class Trial:
    """One objective with its settings and a reward."""

    objective: str
    number: int
    reward: str

    @property
    def name(self) -> str:
        return f"{self.reward}_{self.objective}_{self.number}"

    @property
    def siblings(self) -> list[dict[str, Any]]:
        """Settings of all trials of its objective."""
        return TRIALS[self.objective]

    @property
    def keys(self) -> dict[str, Any]:
        return self.siblings[self.number]

    def config(self, folder: Path, steps: int, **keys: Any) -> Config:
        values = {"objective": self.objective, **COMMON, **self.keys, **REWARDS[self.reward]}
        if "group_size" in self.keys:
            values["train_batch_size"] = 16
        values |= {"max_train_steps": steps, "checkpointing_steps": 5, "project_dir": str(folder)}
        values |= {"verbose": 0, **keys}
        flags = (f"--{key.replace('_', '-')}={value}" for key, value in values.items())
        return load_config([str(DEMO), *flags])

    @property
    def pilot(self) -> "Trial":
        """The trial whose step costs as much: the first with the same settings but for the learning rate's."""
        same = [without_rate(keys) == without_rate(self.keys) for keys in self.siblings]
        return Trial(self.objective, same.index(True), self.reward)

    @property
    def cost(self) -> dict[str, float]:
        """What a step costs: ``step_seconds``, ``step_queries``, ``step_evaluations``; and ``peak_gb``."""
        if (cost := self.pilot.kept("pilot")) is None:
            raise SystemExit(f"{self.pilot.name} has not been timed; run this command with --pilots first")
        return cost

    def steps_of(self, **budget: float) -> int:
        """Optimiser steps that spend a budget: so many ``seconds`` or ``queries``."""
        ((unit, amount),) = budget.items()
        return max(1, round(amount / self.cost[f"step_{unit}"]))

    def kept(self, kind: str) -> dict[str, Any] | None:
        """The result of a kind of run, if it is known."""
        return read_results().get(self.name, {}).get(kind)

    def keep(self, kind: str, result: Mapping[str, Any]) -> None:
        with folder_lock(FOLDER):
            results = read_results()
            results.setdefault(self.name, {})[kind] = result
            write_whole(RESULTS, json.dumps(dict(sorted(results.items())), indent=1) + "\n")

    def courses(self, kind: str = "seed") -> list[dict[str, Any]]:
        """Results of the runs of a kind with each seed."""
        runs = read_results().get(self.name, {})
        return [runs[name] for name in sorted(runs) if name.startswith(f"{kind}_")]


def without_rate(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that change what a step costs."""
    return {key: value for key, value in keys.items() if key != "lr"}


def read_results() -> dict[str, dict[str, Any]]:
    """What is known of each run, by trial and kind of run."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def measure_pilot(trial: Trial) -> None:
    """Train a few steps and keep what each cost; runs in a process of its own, whose peak memory is the pilot's."""
    counter = counted(trial.config(FOLDER / "pilots" / trial.name, PILOT_STEPS, **PILOT))
    result = {
        "step_seconds": min(counter.seconds[1:]),
        "step_queries": counter.queries / PILOT_STEPS,
        "step_evaluations": counter.evaluations / PILOT_STEPS,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    trial.keep("pilot", result)


def counted(config: Config) -> Counter:
    """What the training steps of a run cost."""
    counter = Counter()
    with mock.patch.object(Trainer, "train_step", counter.counted(Trainer.train_step)):
        run(config)
    return counter


def run_pilot(trial: Trial) -> None:
    """Measure the cost of a step, unless it is known."""
    if trial.kept("pilot") is None:
        own = ["--reward", trial.reward, "--pilot", trial.objective, str(trial.number)]
        subprocess.run([sys.executable, "-m", "scripts.demo.study_objectives", *own], cwd=ROOT, check=True)


def train(trial: Trial, seed: int, steps: int, kind: str) -> dict[str, Any]:
    """The course of a run of so many optimiser steps; ``kind``: ``search``, ``seed_<n>`` or ``long_<n>``."""
    if is_complete(result := trial.kept(kind) or {}, kind, steps):
        return result
    folder = FOLDER / "runs" / f"{trial.name}_{kind}"
    if (validations := VALIDATIONS.get(kind.partition("_")[0])) is None:
        interval = trial.steps_of(queries=VALIDATED_QUERIES)
    else:
        interval = -(-steps // validations)
    often = {"validation_steps": interval, "val_prompt_path": validation_prompts()}
    run(trial.config(folder, steps, seed=seed, **often, **VALIDATED))
    result = course_of(folder, steps)
    if kind != "search":
        result |= held_out(folder)
    trial.keep(kind, result)
    return result


def course_of(folder: Path, steps: int) -> dict[str, Any]:
    """The validations of a run of so many optimiser steps, by measure."""
    table = read_table(folder / "validation.csv")
    if (done := int(table[-1]["step"])) < steps:
        raise SystemExit("stopped; the same command continues")
    if done > steps:
        raise SystemExit(f"{folder} holds a run of {done} steps, and {steps} are asked for; remove it")
    course = {name: [row[name] for row in table] for name in ("reward", *SIDE_EFFECTS)}
    return {"steps": [int(row["step"]) for row in table]} | course


def is_complete(result: Mapping[str, Any], kind: str, steps: int) -> bool:
    """Whether a kept result is of so many optimiser steps or more, with the held-out comparison if it needs one."""
    return bool(result) and result["steps"][-1] >= steps and (kind == "search" or "held_out" in result)


def validation_prompts() -> Path:
    """A file of captions that are neither trained on nor among those of the final comparison."""
    _, captions = validation_scenes()
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_whole(path := FOLDER / "validation_prompts.txt", "\n".join(captions) + "\n")
    return path


def validation_scenes() -> tuple[list[world.Scene], list[str]]:
    """Scenes that searches and courses are judged on, and their captions."""
    return heldout(VALIDATED["num_val_runs"] * VALIDATED["val_batch_size"], VALIDATION_SEED)


@functools.cache
def held_out_videos() -> HeldOut:
    return HeldOut(Trial("reward_gradient", 0, "pick_score").config(FOLDER, 1), HELD_OUT)


def held_out(folder: Path) -> dict[str, Any]:
    """What base model and adapter score on held-out prompts, by measure, and the share of the gap that was closed.

    Whatever was trained, ``reward`` is PickScore; the oracle is the measures beside it.
    """
    found = held_out_videos().compare(str(folder / "adapter"))
    gains = {name: vars(found.gain(name)) for name in MEASURES}
    return {"held_out": gains, "share_of_gap": found.share_of_distance}


def all_trials(objective: str, reward: str) -> list[Trial]:
    return [Trial(objective, number, reward) for number in range(len(Trial(objective, 0, reward).siblings))]


def search(objective: str) -> None:
    """Train each trial of an objective once."""
    for trial in all_trials(objective, SEARCHED):
        train(trial, SEARCH_SEED, trial.steps_of(seconds=SEARCH_SECONDS), "search")


def best(objective: str, reward: str, kind: str) -> Trial:
    """The trial whose search run ended with the highest validation reward; for ``long`` runs, of lasting rates."""

    def found(trial: Trial) -> float:
        if (course := trial.kept("search")) is None:
            raise SystemExit(
                f"{trial.name} has not been searched; run this command with --only {objective} first"
            )
        return course["reward"][-1]

    highest = LASTING_RATE if kind == "long" and objective in GRADIENT_FREE else math.inf
    trials = (trial for trial in all_trials(objective, SEARCHED) if trial.keys["lr"] <= highest)
    return dataclasses.replace(max(trials, key=found), reward=reward)


def timed(objectives: Iterable[str], reward: str, kind: str) -> list[Trial]:
    """The trials whose cost has to be known: all where settings are searched, else those that are chosen."""
    if reward == SEARCHED:
        return [trial for objective in objectives for trial in all_trials(objective, reward)]
    return [best(objective, reward, kind) for objective in objectives]


def queries_to_reach(
    course: Mapping[str, Sequence[float]], step_queries: float, target: float
) -> float | None:
    """Reward queries after which a course first has a reward, interpolated; None where it never has it."""
    pairs = list(zip(course["steps"], course["reward"], strict=True))
    for (before, low), (after, high) in zip(pairs, pairs[1:], strict=False):
        if high >= target:
            share = 0.0 if low >= target else (target - low) / (high - low)
            return step_queries * (before + share * (after - before))
    return None


def reward_after(course: Mapping[str, Sequence[float]], step_queries: float, queries: float) -> float:
    """Reward of a course after so many queries, interpolated."""
    return float(np.interp(queries / step_queries, course["steps"], course["reward"]))


def rows_of(reward: str, kind: str = "seed") -> list[dict[str, Any]]:
    """One row per trial that has runs of a kind, the highest trained reward first."""
    trials = (trial for objective in TRIALS for trial in trained(objective, reward, kind))
    rows = [row_of(trial, trial.courses(kind), trial.cost) for trial in trials]
    return sorted(rows, key=lambda row: -row["reward" if reward == SEARCHED else "trained_after"])


def trained(objective: str, reward: str, kind: str) -> list[Trial]:
    return [trial for trial in all_trials(objective, reward) if trial.courses(kind)]


def row_of(trial: Trial, courses: Sequence[dict[str, Any]], cost: Mapping[str, float]) -> dict[str, Any]:
    """Gains of a trial as means over its seeds, what fell beside them, and what it cost."""
    steps = statistics.mean(course["steps"][-1] for course in courses)
    row: dict[str, Any] = {"objective": trial.objective, "settings": trial.keys, "seeds": len(courses)}
    for name in MEASURES:
        row[name] = statistics.mean(course["held_out"][name]["gain"] for course in courses)
    gains = [course["held_out"]["reward"]["gain"] for course in courses]
    row |= {"lowest": min(gains), "highest": max(gains)}
    row["share_of_gap"] = statistics.mean(course["share_of_gap"] for course in courses)
    for name, place in (("trained_before", 0), ("trained_after", -1)):
        row[name] = statistics.mean(course["reward"][place] for course in courses)
    for name in SIDE_EFFECTS:
        row[f"{name}_change"] = statistics.mean(course[name][-1] / course[name][0] - 1 for course in courses)
    row |= {"steps": steps, "queries": steps * cost["step_queries"]}
    row |= {"evaluations": steps * cost["step_evaluations"], "seconds": steps * cost["step_seconds"]}
    return row | {"peak_gb": cost["peak_gb"]}


def in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())


def longer_table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["objective", "settings", "seeds", "reward queries", "seconds", "trained reward", "PickScore"]
    lines = [[*header, "gap closed", "colour", "shape", "motion right", "diversity"]]
    for row in rows:
        cells = [f"`{row['objective']}`", in_words(row["settings"]), str(row["seeds"])]
        cells += [f"{row['queries']:.0f}", f"{row['seconds']:.0f}"]
        cells += [f"{row['trained_before']:.3g} → {row['trained_after']:.3g}", f"{row['reward']:+.1f}"]
        cells += [f"{row['share_of_gap']:.0%}"]
        cells += [f"{100 * row[name]:+.1f}" for name in ("colour", "shape", "direction")]
        lines.append([*cells, f"{row['diversity_change']:+.1%}"])
    return as_table(lines)


def gains_table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["objective", "settings", "PickScore", "lowest to highest", "gap closed", "colour", "shape"]
    header += ["motion right", "motion", "dynamic degree", "diversity"]
    lines = [header]
    for row in rows:
        cells = [f"`{row['objective']}`", in_words(row["settings"]), f"{row['reward']:+.1f}"]
        cells += [f"{row['lowest']:+.1f} to {row['highest']:+.1f}", f"{row['share_of_gap']:.0%}"]
        cells += [f"{100 * row[name]:+.1f}" for name in ("colour", "shape", "direction")]
        lines.append(cells + [f"{row[f'{name}_change']:+.1%}" for name in SIDE_EFFECTS])
    return as_table(lines)


def costs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [["objective", "steps", "reward queries", "network evaluations", "seconds", "peak GB"]]
    for row in rows:
        counts = [f"{row[name]:.0f}" for name in ("steps", "queries", "evaluations", "seconds")]
        lines.append([f"`{row['objective']}`", *counts, f"{row['peak_gb']:.1f}"])
    return as_table(lines)


def search_table(reward: str) -> str:
    """Every trial's search run: optimiser steps, and the reward before and after."""
    lines = [["objective", "settings", "steps", "reward before", "after"]]
    for objective in TRIALS:
        for trial in all_trials(objective, reward):
            if course := trial.kept("search"):
                rewards = [f"{course['reward'][place]:.1f}" for place in (0, -1)]
                lines.append([f"`{objective}`", in_words(trial.keys), str(course["steps"][-1]), *rewards])
    return as_table(lines)


def as_table(lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; the first line is its header."""
    header, *rest = lines
    rows = (header, ["---"] * len(header), *rest)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def query_ratios(reward: str) -> list[str]:
    """A table: queries that each gradient-free objective takes to gain as much as the best one with a gradient."""
    rows = rows_of(reward)
    gradient = next((row for row in rows if row["objective"] not in GRADIENT_FREE), None)
    if gradient is None:
        return []
    reference = trial_of(gradient, reward)
    gains = {spent: gain for spent in QUERIES if (gain := gain_after(reference, spent)) is not None}
    lines = [["objective", "settings", *(f"{spent} queries, {gain:+.1f}" for spent, gain in gains.items())]]
    for row in rows:
        if row["objective"] in GRADIENT_FREE:
            trial, courses = lasting(row, reward)
            cells = [ratios(trial, courses, gain, spent) for spent, gain in gains.items()]
            lines.append([f"`{trial.objective}`", in_words(trial.keys), *cells])
    return [RATIOS.format(reference.objective), as_table(lines)]


def gain_after(trial: Trial, queries: float) -> float | None:
    """Mean over seeds of what a trial has gained after so many reward queries.

    Long runs answer where the others are too short; None where they are, too.
    """
    asked = trial.cost["step_queries"]
    for kind in ("seed", "long"):
        courses = trial.courses(kind)
        # The nearest number of whole steps may ask for a few less.
        if courses and all(asked * (course["steps"][-1] + 0.5) >= queries for course in courses):
            return statistics.mean(reward_after(c, asked, queries) - c["reward"][0] for c in courses)
    return None


def ratios(trial: Trial, courses: Sequence[Mapping[str, Any]], gain: float, spent: float) -> str:
    """Queries to a gain, by course, as multiples of ``spent``."""
    asked = trial.cost["step_queries"]
    taken = [queries_to_reach(course, asked, course["reward"][0] + gain) for course in courses]
    return ", ".join(
        f"> {rounded_down(asked * course['steps'][-1] / spent)}"
        if queries is None
        else f"{queries / spent:.1f}"
        for queries, course in zip(taken, courses, strict=True)
    )


def rounded_down(ratio: float) -> str:
    return f"{math.floor(10 * ratio) / 10:.1f}"


def trial_of(row: Mapping[str, Any], reward: str) -> Trial:
    """The trial behind a row."""
    return Trial(row["objective"], TRIALS[row["objective"]].index(row["settings"]), reward)


def lasting(row: Mapping[str, Any], reward: str) -> tuple[Trial, list[dict[str, Any]]]:
    """Of an objective without a gradient, the trial with long runs and those; else the row's own."""
    if row["objective"] in GRADIENT_FREE:
        for trial in trained(row["objective"], reward, "long"):
            return trial, trial.courses("long")
    return (trial := trial_of(row, reward)), trial.courses()


def plot(reward: str) -> None:
    """Reward on validation prompts against queries and seconds: a line per objective, the range over seeds shaded.

    Without a gradient, long runs take the place of the others, as far as all of their seeds went.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "study", "figure.constrained_layout.use": True, "font.size": 9}):
        figure = Figure(figsize=(9, 4))
        for axes, cost_key in zip(figure.subplots(1, 2), ("step_queries", "step_seconds"), strict=True):
            for row in rows_of(reward):
                trial, courses = lasting(row, reward)
                steps = min((course["steps"] for course in courses), key=lambda steps: steps[-1])[1:]
                spent = trial.cost[cost_key] * np.array(steps)
                gains = np.array(
                    [np.interp(steps, c["steps"], c["reward"]) - c["reward"][0] for c in courses]
                )
                axes.plot(spent, gains.mean(0), label=row["objective"])
                axes.fill_between(spent, gains.min(0), gains.max(0), alpha=0.1)
            axes.set(
                xlabel=cost_key.replace("step_", ""),
                xscale="log",
                ylabel="reward on 32 other prompts, change since step 0",
            )
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
        figure.savefig(PLOT, metadata={"Date": None})


def write_docs() -> None:
    """Write the study's section of docs/objectives.md, and beside it the main table as a CSV and the figure."""
    rows = rows_of(SEARCHED)
    with open(TABLE, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(SEARCHED)
    parts = ["## Compared on the demo", GAINS, gains_table(rows), COSTS, costs_table(rows)]
    parts += [*query_ratios(SEARCHED), f"![{FIGURE}](studies/objectives.svg)"]
    for text, reward in ((LONGER, SEARCHED), (WITH_ORACLE, "oracle")):
        if longer := rows_of(reward, "long"):
            parts += [text, longer_table(longer)]
    parts += ["The search, each setting trained once:", search_table(SEARCHED)]
    write_whole(PAGE, with_section(PAGE.read_text(encoding="utf-8"), BEGIN, END, parts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reward", choices=REWARDS, default="pick_score")
    parser.add_argument(
        "--pilots", action="store_true", help="measure the cost of each objective's step alone"
    )
    parser.add_argument(
        "--long", type=float, metavar="QUERIES", help="instead, runs of so many reward queries"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: search only")
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=None, metavar="NAME")
    parser.add_argument("--write-docs", action="store_true", help="train nothing, write the page")
    parser.add_argument("--pilot", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.pilot:
        return measure_pilot(Trial(args.pilot[0], int(args.pilot[1]), args.reward))
    if args.write_docs:
        return write_docs()
    objectives = args.only or (GRADIENT_FREE if args.long or args.reward != SEARCHED else TRIALS)
    kind = "long" if args.long else "seed"
    if args.pilots:
        for trial in timed(objectives, args.reward, kind):
            run_pilot(trial.pilot)
        return None
    budget = {"queries": args.long} if args.long else {"seconds": TRAINING_SECONDS}
    if args.reward == SEARCHED:
        for objective in objectives:
            search(objective)
    chosen = [best(objective, args.reward, kind) for objective in objectives]
    for seed, trial in itertools.product(args.seeds, chosen):
        train(trial, seed, trial.steps_of(**budget), f"{kind}_{seed}")
    return None


if __name__ == "__main__":
    main()
