"""An evaluation from adapters to tables: videos of the base model and of each adapter, scored and compared in pairs.

Everything lands in one folder:

    videos/<variant>/   the videos and their prompts.jsonl; ``base`` is the model without an adapter
    videos.csv          one row per video
    prompts.csv         one row per adapter and prompt
    summary.csv         one row per adapter, measure and kind of prompt
    evaluation.json     the same summary and prompts, with the settings they hold for
    gallery.html        the videos side by side
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from Core.build import fetch_scorers, once_per_machine
from Core.config import BASE, Config
from Core.config.files import read_run
from Core.data.prompts import read_lines
from Core.evaluation.gallery import leave_gallery
from Core.evaluation.metrics import PairedGain, paired_gain
from Core.evaluation.score_videos import Clip, Scorers, write_csv, write_json
from Core.generation.jobs import Variant, make_videos, plan_of, read_variants
from Core.generation.manifest import Sample, read_manifest
from Core.utils.distributed import Distributed

logger = logging.getLogger("vader")
RESULT = "evaluation.json"
# With fewer prompts a bootstrap interval is too narrow to be believed.
ENOUGH_PROMPTS = 8


@dataclass(frozen=True)
class Row:
    """One video's scores. ``seen``: whether its prompt was trained on, None when that is not known."""

    variant: str
    index: int
    prompt: str
    seed: int
    file: str
    seen: bool | None
    scores: Mapping[str, float]

    def flat(self) -> dict[str, Any]:
        named = {"variant": self.variant, "index": self.index, "prompt": self.prompt}
        named |= {"in_training": kind_of(self.seen), "seed": self.seed, "file": self.file}
        return named | dict(self.scores)


def compare(
    config: Config,
    distributed: Distributed,
    adapters: Sequence[str],
    rewards: Mapping[str, Mapping[str, Any]],
    folder: Path,
    training: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Evaluate ``adapters`` against the base model; the content of ``evaluation.json``.

    Args:
        config: of inference; its prompts, seed and ``num_sample`` say which videos.
        rewards: names with their arguments.
        training: prompts the adapters were trained on; None looks them up in the adapters' runs.

    Raises:
        ValueError, FileNotFoundError: an adapter that does not load or fit, weights that cannot be had.
        IncompleteError: videos could not be made.
    """
    variants = read_variants([BASE, *adapters], config.backbone.original_names)
    # Loaded only when the videos are there, but missed before the hours it takes to make them.
    once_per_machine(distributed, lambda: fetch_scorers(rewards.items()))
    prompts = config.prompt_list
    folders = [folder / "videos" / variant.name for variant in variants]
    make_videos(config, distributed, variants, folders)
    if len(prompts) < ENOUGH_PROMPTS:
        logger.warning("few prompts (%d): their intervals are narrower than they should be", len(prompts))
    scorers = Scorers(list(rewards), rewards, distributed.device)
    known = training if training is not None else prompts_of_runs(adapters)
    rows = score_variants(distributed, scorers, variants, folders, plan_of(config), known)
    settings = [variant.settings(config) | {"name": variant.name} for variant in variants[1:]]
    result = result_of(rows, settings, rewards, scorers.lower_is_better, known)
    if distributed.is_main:
        write_tables(folder, rows, result)
        leave_gallery(folder)
    distributed.barrier()
    return result


def result_of(
    rows: Sequence[Row],
    adapters: Sequence[Mapping[str, Any]],
    rewards: Mapping[str, Mapping[str, Any]],
    lower_is_better: set[str],
    training: Sequence[str] | None,
) -> dict[str, Any]:
    """The content of ``evaluation.json``.

    Args:
        adapters: name and settings of each; ``rewards``: names with their arguments.
        training: prompts the adapters were trained on; None where they are not known.
    """
    seeds = {row.seed for row in rows}
    return {
        "adapters": list(adapters),
        "rewards": dict(rewards),
        "lower_is_better": sorted(lower_is_better),
        "prompts": len({row.index for row in rows}),
        "num_sample": len(seeds),
        "seeds": [min(seeds), max(seeds)],
        "training_prompts": None if training is None else len(training),
        "summary": summary(rows, lower_is_better),
        "per_prompt": per_prompt(rows, lower_is_better),
    }


def score_variants(
    distributed: Distributed,
    scorers: Scorers,
    variants: Sequence[Variant],
    folders: Sequence[Path],
    plan: Sequence[Sample],
    training: Sequence[str] | None,
) -> list[Row]:
    """Scores of all videos, the work spread over the processes, in the order of variant, prompt and seed."""
    seen = None if training is None else {normal(text) for text in training}
    jobs = [
        (variant, folder, group)
        for variant, folder in zip(variants, folders, strict=True)
        for group in samples_by_prompt(plan)
    ]
    rows = []
    for variant, folder, group in jobs[distributed.rank :: distributed.num_processes]:
        files = {entry["name"]: entry["file"] for entry in read_manifest(folder)}
        scores = scorers([Clip(folder / files[sample.name], sample.prompt) for sample in group])
        for sample, values in zip(group, scores, strict=True):
            text = sample.prompt.reward_text
            known = None if seen is None else normal(text) in seen
            file = f"videos/{variant.name}/{files[sample.name]}"
            rows.append(Row(variant.name, sample.index, text, sample.seed, file, known, values))
    order = {variant.name: number for number, variant in enumerate(variants)}
    return sorted(distributed.gather_objects(rows), key=lambda row: (order[row.variant], row.index, row.seed))


def samples_by_prompt(plan: Sequence[Sample]) -> list[list[Sample]]:
    groups: dict[int, list[Sample]] = {}
    for sample in plan:
        groups.setdefault(sample.index, []).append(sample)
    return list(groups.values())


def normal(text: str) -> str:
    """A prompt as it is compared: case and spacing do not matter."""
    return " ".join(text.lower().split())


def kind_of(seen: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown"}[seen]


def prompts_of_runs(adapters: Sequence[str]) -> list[str] | None:
    """Prompts that all the adapters were trained on together, from their run folders; None if one is unknown."""
    found = [training_prompts(Path(adapter).expanduser()) for adapter in adapters]
    known = [prompts for prompts in found if prompts is not None]
    return sorted({prompt for prompts in known for prompt in prompts}) if len(known) == len(found) else None


def training_prompts(adapter: Path) -> list[str] | None:
    """Prompts of the run an adapter lies in, by the configuration above it."""
    try:
        found = filter(None, map(read_run, list(adapter.absolute().parents)[:3]))
        values = next(found, None)
        return [prompt.reward_text for prompt in Config.of(values).prompt_list] if values else None
    except (ValueError, OSError, TypeError, AttributeError) as error:
        logger.warning("which prompts %s was trained on is not known: %s", adapter, error)
        return None


def read_training_prompts(path: str, config: Config) -> list[str]:
    """Prompts of a file, as a reward reads them."""
    return [prompt.reward_text for prompt in config.backbone.parse_prompts(read_lines(path))]


def paired(rows: Sequence[Row], adapter: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores [P, S] of the base model and of an adapter, prompt by prompt and seed by seed."""
    tables = []
    for variant in (BASE, adapter):
        chosen = [row for row in rows if row.variant == variant]
        prompts = dict.fromkeys(row.index for row in chosen)
        tables.append(np.array([[r.scores[name] for r in chosen if r.index == i] for i in prompts]))
    return tables[0], tables[1]


def summary(rows: Sequence[Row], lower_is_better: set[str]) -> list[dict[str, Any]]:
    """Gains by adapter, measure and kind of prompt."""
    kinds = {"all": rows}
    if {row.seen for row in rows} == {True, False}:
        kinds |= {"held-out": [r for r in rows if not r.seen], "training": [r for r in rows if r.seen]}
    elif all(row.seen is not None for row in rows):
        kinds = {"training" if rows[0].seen else "held-out": rows}
    adapters = dict.fromkeys(row.variant for row in rows if row.variant != BASE)
    table = []
    for adapter in adapters:
        for name in rows[0].scores:
            for kind, chosen in kinds.items():
                gain = paired_gain(*paired(chosen, adapter, name))
                table.append({"adapter": adapter, "measure": name, "prompts_are": kind, **entry(gain)})
                table[-1]["prompts"] = len({row.index for row in chosen})
                if name in lower_is_better:
                    table[-1]["win_rate"] = 1 - table[-1]["win_rate"]
    return table


def entry(gain: PairedGain) -> dict[str, Any]:
    """A gain as JSON takes it, with the digits that mean something."""
    numbers = {key: _rounded(value) for key, value in dataclasses.asdict(gain).items()}
    return numbers | {"significant": gain.significant}


def _rounded(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def per_prompt(rows: Sequence[Row], lower_is_better: set[str]) -> list[dict[str, Any]]:
    """Mean scores of each prompt before and after, by adapter."""
    table = []
    for adapter in dict.fromkeys(row.variant for row in rows if row.variant != BASE):
        for index in dict.fromkeys(row.index for row in rows):
            own = [row for row in rows if row.index == index]
            line = {"adapter": adapter, "index": index, "prompt": own[0].prompt}
            line["in_training"] = kind_of(own[0].seen)
            for name in own[0].scores:
                before, after = (values.mean() for values in paired(own, adapter, name))
                line |= {f"{name}_before": _rounded(before), f"{name}_after": _rounded(after)}
                line[f"{name}_gain"] = _rounded(after - before)
            table.append(line)
    return table


def write_tables(folder: Path, rows: Sequence[Row], result: Mapping[str, Any]) -> None:
    write_csv(folder / "videos.csv", [row.flat() for row in rows])
    write_csv(folder / "prompts.csv", result["per_prompt"])
    write_csv(folder / "summary.csv", result["summary"])
    write_json(folder / RESULT, result)
