"""One self-contained HTML page about a run: curves, gains with intervals, videos side by side, how to repeat it.

Everything shown is read from files of the run folder, and the page names the file under each figure.
"""

import csv
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jinja2
from markupsafe import Markup

from Core.config import BASE, Config
from Core.config.files import RERUN, RESOLVED, read_run
from Core.data.video import smaller
from Core.evaluation.charts import Line, Plot, line_chart, stack_chart
from Core.evaluation.page import MadeVideos, data_uri, kind_of_media, number, render, signed
from Core.generation.manifest import read_manifest
from Core.utils.damage import reason_of
from Core.utils.environment import read_starts
from Core.utils.files import read_object, write_whole
from Core.utils.tables import read_table, read_text_table
from Core.utils.words import duration

logger = logging.getLogger("vader")
REPORT, GALLERY = "report.html", "gallery.html"
TEMPLATE = "report_page.html"
# Bytes of video in the page; base64 adds a third, and the page stays below 20 MB. Validation has all of them where
# nothing was evaluated.
EVALUATION_BYTES, VALIDATION_BYTES = 8_000_000, 4_000_000
SELECTED_PROMPTS, UNSELECTED_PROMPTS = 3, 6
LISTED_PROMPTS = 1000
REENCODED_WIDTH, REENCODED_CRF = 320, 30
# Of columns that are always there: title, and the label of the vertical axis.
TITLES = {
    "reward": ("Reward", "reward"),
    "loss": ("Loss", "loss"),
    "grad_norm": ("Gradient norm", "L2 norm before clipping"),
    "lr": ("Learning rate", "learning rate"),
    "seconds": ("Seconds per step", "time (s)"),
}
# Of what validation measures by itself; other columns are scores, in units of their own.
UNITS = {
    "motion": "change per frame (0 to 2)",
    "diversity": "RMS distance (0 to 2)",
    "dynamic_degree": "motion / threshold",
}
# Columns of metrics.csv that are no part of a reward or an objective.
COUNTERS = ("step", "skipped", "skipped_steps", "all_reduce_share", "train_reward")


@dataclass(frozen=True)
class Chart:
    """A drawn chart, its title, and the files and columns it was drawn from."""

    title: str
    plot: Plot
    source: str

    @property
    def svg(self) -> Markup:
        return Markup(self.plot.svg)


class Media(Protocol):
    """Where a page finds the videos it shows."""

    def uri(self, file: Path) -> str | None:
        """What the page refers to; None for a file that it does not show."""


@dataclass(frozen=True)
class Shown:
    """A video in the page: what made it, its URI (None for one left out), its score, its file.

    ``step``: its place on the slider over the validations, None for one that is always seen.
    """

    label: str
    uri: str | None
    kind: str
    score: str
    file: str
    step: int | None = None


@dataclass(frozen=True)
class Pair:
    """The videos of one prompt and seed, the base model's first."""

    prompt: str
    note: str
    gain: str
    better: bool | None
    videos: list[Shown]


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the run folder and return its path.

    Args:
        run: folder of a training run, with its ``evaluation`` if there is one, or of an evaluation alone.

    Raises:
        FileNotFoundError: the folder holds nothing to report.
    """
    run = Path(run).expanduser()
    evaluation = find_evaluation(run)
    if evaluation is None and not (run / "metrics.csv").is_file():
        raise FileNotFoundError(
            f"{str(run)!r} has neither metrics.csv nor evaluation.json; give the folder of a run or an evaluation"
        )
    try:
        page = render(TEMPLATE, gather(run, evaluation, *budgets(run, evaluation)))
    except (LookupError, TypeError, AttributeError, ValueError, csv.Error, jinja2.TemplateError) as error:
        if isinstance(error, ValueError) and str(run) in str(error):
            raise
        tables = ", ".join(str(path) for path in tables_of(run, evaluation))
        raise ValueError(
            f"one of {tables} is damaged ({reason_of(error)}); make it again, or move it away"
        ) from error
    write_whole(run / REPORT, page)
    return run / REPORT


def find_evaluation(run: Path) -> Path | None:
    """The evaluation in a run, or the folder itself where it is one."""
    return next((f for f in (run / "evaluation", run) if (f / "evaluation.json").is_file()), None)


def tables_of(run: Path, evaluation: Path | None) -> list[Path]:
    """The tables of a report that are there."""
    places = [run / "metrics.csv", run / "validation.csv"]
    places += [evaluation / name for name in ("evaluation.json", "videos.csv")] if evaluation else []
    return [path for path in places if path.exists()]


def budgets(run: Path, evaluation: Path | None) -> tuple["VideoBudget", "VideoBudget"]:
    """What the videos of the evaluation and of the validations may take."""
    total = VALIDATION_BYTES if evaluation else EVALUATION_BYTES + VALIDATION_BYTES
    return VideoBudget(EVALUATION_BYTES, run), VideoBudget(total, run)


def gather(
    run: Path, evaluation: Path | None, evaluated: "Media", validated: "Media", live: bool = False
) -> dict[str, Any]:
    """Everything the template shows.

    Args:
        evaluated: finds the videos of the evaluation; ``validated``: those of the validations.
        live: the page is served while the run goes on, and refreshes itself.
    """
    metrics, validation = read_rows(run / "metrics.csv"), read_rows(run / "validation.csv")
    result = read_object(evaluation / "evaluation.json") if evaluation else None
    values = saved_values(run)
    relative = "" if evaluation in (None, run) else "evaluation/"
    return {
        "name": run.resolve().name,
        "live": live,
        "facts": facts(metrics, values),
        "measures": measure_rows(result) if result else [],
        "headline": headline(result, metrics, validation),
        "few_prompts": result["prompts"] < 8 if result else False,
        "evaluation": result,
        "yes_or_no": yes_or_no(result) if result else [],
        "notes": (result or {}).get("notes", []),
        "relative": relative,
        "gallery": f"{relative}{GALLERY}" if evaluation and (evaluation / GALLERY).is_file() else None,
        "groups": evaluation_groups(evaluation, result, evaluated) if evaluation and result else [],
        "films": validation_films(run, validation, validated),
        "charts": list(charts(metrics, validation, values.get("reward_fn"))),
        "prompts": (result or {}).get("per_prompt", [])[:LISTED_PROMPTS],
        "main": main_measure(result) if result else None,
        "config": config_rows(values),
        "config_file": RESOLVED if (run / RESOLVED).is_file() else RERUN,
        "starts": read_starts(run) or (read_starts(evaluation) if evaluation else []),
        "warnings": warnings(run / "log.txt"),
        "checkpoint": newest_manifest(run),
    }


def saved_values(run: Path) -> dict[str, Any]:
    """The run's resolved configuration, read as data; empty where there is none or it holds a program."""
    try:
        return read_run(run) or {}
    except (ValueError, OSError) as error:
        logger.warning("the configuration is left out of the report: %s", error)
        return {}


def read_rows(path: Path) -> list[dict[str, float]]:
    return read_table(path) if path.is_file() else []


def main_measure(result: Mapping[str, Any]) -> str:
    """The first reward asked for; the measures that need no weights come after all rewards."""
    return next(iter(result["rewards"]), result["summary"][0]["measure"])


def headline(
    result: Mapping[str, Any] | None, metrics: Sequence[Mapping], validation: Sequence[Mapping]
) -> dict[str, Any] | None:
    """What the run achieved, on held-out prompts where there are any."""
    if result:
        measure = main_measure(result)
        sign = -1 if measure in result["lower_is_better"] else 1
        rows = [row for row in result["summary"] if row["measure"] == measure]
        held_out = [row for row in rows if row["prompts_are"] == "held-out"]
        best = max(held_out or rows, key=lambda row: -math.inf if row["gain"] is None else sign * row["gain"])
        up = (best["gain"] or 0) > 0
        good = None if not best["significant"] else up != (measure in result["lower_is_better"])
        return best | {"good": good, "source": "evaluation.json"}
    table, source = (validation, "validation.csv") if validation else (metrics, "metrics.csv")
    if not table:
        return None
    before, after = table[0]["reward"], table[-1]["reward"]
    row = {"measure": "reward", "before": before, "after": after, "gain": after - before, "low": None}
    return row | {"high": None, "good": None, "source": source, "prompts_are": None, "win_rate": None}


def facts(metrics: Sequence[Mapping[str, float]], values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Short name and value of what one wants to know first."""
    found = []
    if metrics:
        seconds = [row["seconds"] for row in metrics if math.isfinite(row["seconds"])]
        done, asked = f"{metrics[-1]['step']:.0f}", values.get("max_train_steps")
        found.append(("steps", done if str(asked) in (done, "None") else f"{done} of {asked}"))
        found.append(("training time", duration(sum(seconds))))
        skipped = sum(row.get("skipped", 0) for row in metrics)
        if skipped:
            found.append(("steps skipped", f"{skipped:.0f}"))
    if values:
        found += [("reward", reward_name(values)), ("adapter rank", str(values.get("lora_rank")))]
        mode, steps = values.get("backprop_mode"), values.get("backprop_steps")
        if mode:
            found.append(("gradient window", f"last {steps}" if mode == "last" else str(mode)))
        else:
            found.append(("objective", str(values.get("objective"))))
    return found


def reward_name(values: Mapping[str, Any]) -> str:
    reward = values.get("reward_fn")
    if isinstance(reward, Mapping):
        return ", ".join(f"{weight:g} × {name}" for name, weight in reward.items())
    return str(reward)


def yes_or_no(result: Mapping[str, Any]) -> list[str]:
    """Measures that are 1 or 0 for each video; a table shows ticks, and their means are shares."""
    return list(result.get("yes_or_no", []))


def measure_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of gains, measure by measure, each with the geometry of its interval on a scale of -1 to 1."""
    summary, shares = result["summary"], yes_or_no(result)
    order = list(dict.fromkeys((row["measure"], row["prompts_are"]) for row in summary))
    rows: list[dict[str, Any]] = []
    for row in sorted(summary, key=lambda row: order.index((row["measure"], row["prompts_are"]))):
        own = [other for other in summary if other["measure"] == row["measure"]]
        extent = max([abs(other[key] or 0) for other in own for key in ("low", "high")] + [1e-12]) * 1.1
        place = {key: 50 + 50 * (row[key] or 0) / extent for key in ("low", "gain", "high")}
        first = not rows or rows[-1]["measure"] != row["measure"]
        lower = row["measure"] in result["lower_is_better"]
        shown = as_percentages(row) if row["measure"] in shares else row
        rows.append(
            shown
            | {"verdict": verdict(row, lower), "place": place, "lower": lower, "first": first}
            | {"percent": row["measure"] in shares}
        )
    return rows


def verdict(row: Mapping[str, Any], lower: bool) -> str | None:
    """``better`` or ``worse``, ``changed`` for a measure that is neither; None where no difference is shown."""
    if not row["significant"]:
        return None
    if row["measure"] in ("motion", "sharpness", "diversity"):
        return "changed"
    return "better" if (row["gain"] > 0) != lower else "worse"


def as_percentages(row: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("before", "after", "gain", "low", "high")
    return {**row, **{key: None if row[key] is None else round(100 * row[key], 1) for key in keys}}


def charts(metrics: Sequence[Mapping], validation: Sequence[Mapping], reward: Any) -> Iterator[Chart]:
    """Curves of what there is: the usual ones first, then the parts of the reward, then what validation measures.

    Args:
        reward: ``reward_fn``; the weights of a mixture are shown with its parts.
    """
    for key, (title, unit) in TITLES.items():
        if key == "seconds" and (chart := time_chart(metrics, title, unit)):
            yield chart
        elif chart := curves(key, title, unit, metrics, validation, smooth=key not in ("lr", "seconds")):
            yield chart
    weights = reward if isinstance(reward, Mapping) else {}
    columns = [name for rows in (metrics, validation) if rows for name in rows[0]]
    others = [n for n in dict.fromkeys(columns) if n not in (*TITLES, *COUNTERS) and n[:8] != "seconds_"]
    for key in sorted(others, key=lambda name: name not in weights):
        if not only_part(key, metrics, validation):
            title = f"Validation: {key.replace('_', ' ')}"
            if metrics and key in metrics[0]:
                title = f"Part: {key.replace('_', ' ')}"
            if key in weights:
                title = f"Part of the reward: {weights[key]:g} × {key}"
            chart = curves(key, title, UNITS.get(key, "score"), metrics, validation)
            yield from [chart] if chart else []


def only_part(key: str, *tables: Sequence[Mapping[str, float]]) -> bool:
    """Whether a column is the reward by another name: a reward of a single part has that part's curve already."""
    own = [rows for rows in tables if rows and key in rows[0]]
    return all(column(rows, key) == column(rows, "reward") for rows in own)


def curves(
    key: str,
    title: str,
    unit: str,
    metrics: Sequence[Mapping],
    validation: Sequence[Mapping],
    smooth: bool = True,
) -> Chart | None:
    """A column as training and validation have it; None where neither has a number."""
    lines, sources = [], []
    if has_numbers(metrics, key):
        lines.append(curve("training", metrics, key, smooth=smooth))
        sources.append(f"metrics.csv: {key}")
    if has_numbers(validation, key):
        lines.append(curve("validation", validation, key, dots=True))
        sources.append(f"validation.csv: {key}")
    if not lines:
        return None
    name = key if key in TITLES else f"column-{re.sub(r'[^A-Za-z0-9_-]', '-', key)}"
    return Chart(title, line_chart(name, lines, unit), "; ".join(sources))


def time_chart(metrics: Sequence[Mapping], title: str, unit: str) -> Chart | None:
    """Where the time of a step goes, phase by phase; None where it was not measured."""
    prefix = "seconds_"
    parts = sorted(name for name in (metrics[0] if metrics else {}) if name.startswith(prefix))
    if not parts:
        return None
    stacked = {name.removeprefix(prefix).replace("_", " "): column(metrics, name) for name in parts}
    plot = stack_chart("seconds", column(metrics, "step"), stacked, unit)
    left_out = len(stacked) - len(plot.data["lines"])
    shown = [line["label"].replace(" ", "_") for line in plot.data["lines"]]
    source = f"metrics.csv: {', '.join(prefix + name for name in reversed(shown))}"
    return Chart(title, plot, source + (f"; {left_out} phases below 0.5% are left out" if left_out else ""))


def has_numbers(rows: Sequence[Mapping[str, float]], key: str) -> bool:
    return bool(rows) and key in rows[0] and any(math.isfinite(value) for value in column(rows, key))


def curve(label: str, rows: Sequence[Mapping], key: str, **look: bool) -> Line:
    return Line(label, column(rows, "step"), column(rows, key), **look)


def column(rows: Sequence[Mapping[str, float]], key: str) -> list[float]:
    return [row[key] for row in rows]


class VideoBudget:
    """Turns files into data URIs until the page would become too large.

    Args:
        total: bytes; a file that takes more than a fortieth of it is encoded again, smaller.
        root: folder that the files must lie in, wherever links lead.
    """

    def __init__(self, total: int, root: Path):
        self.left, self.each, self.made = total, total // 40, MadeVideos(root)

    def uri(self, file: Path) -> str | None:
        """The file's content as a data URI; None when it does not fit any more, is gone, or is no video of the run."""
        if file not in self.made:
            logger.warning(
                "left out of the report, since it is gone or no video that this run made: %s", file
            )
            return None
        if self.left <= 0:
            return None
        content = file.read_bytes()
        if len(content) > self.each and file.suffix == ".mp4":
            content = smaller(file, REENCODED_WIDTH, REENCODED_CRF)
        if len(content) > self.left:
            self.left = 0  # a long run has thousands of videos, each of them seconds to make smaller
            return None
        self.left -= len(content)
        return data_uri(content, file.suffix)


def evaluation_groups(
    folder: Path, result: Mapping[str, Any], videos: Media
) -> list[tuple[str, str, list[Pair]]]:
    """Videos of the most improved, the most harmed and some unselected prompts: title, explanation, pairs.

    Of so few prompts that all of them are shown unselected, none is selected.
    """
    measure, adapter = main_measure(result), result["adapters"][0]["name"]
    lines = [line for line in result["per_prompt"] if line["adapter"] == adapter]
    sign = -1 if measure in result["lower_is_better"] else 1
    ranked = sorted(lines, key=lambda line: -sign * (line[f"{measure}_gain"] or 0))
    improved = [line for line in ranked if sign * (line[f"{measure}_gain"] or 0) > 0][:SELECTED_PROMPTS]
    harmed = [line for line in reversed(ranked) if sign * (line[f"{measure}_gain"] or 0) < 0]
    harmed = harmed[:SELECTED_PROMPTS]
    first = lines[:UNSELECTED_PROMPTS]
    pairs = EvaluationPairs(folder, result, measure, sign, videos)
    explained = f"by mean gain in {measure} over the seeds, {adapter} against the base model"
    groups = [
        ("First prompts of the list", "not selected by any score", first),
    ]
    if len(lines) > UNSELECTED_PROMPTS:
        groups += [("Most improved", explained, improved), ("Most harmed", explained, harmed)]
    made: dict[str, list[Pair]] = {title: [] for title, _, _ in groups}
    # Groups take turns, so that a tight budget takes from all of them.
    for title, line in interleave(*([(title, line) for line in own] for title, _, own in groups)):
        made[title].append(pairs(line))
    return [(title, note, made[title]) for title, note, own in groups if own]


def interleave(*lists: Sequence) -> list:
    """The first entries of all lists, then the second ones, and so on."""
    longest = max(map(len, lists))
    return [own[place] for place in range(longest) for own in lists if place < len(own)]


class EvaluationPairs:
    """Makes the ``Pair`` of a prompt from ``videos.csv``: the base model and every adapter at one seed.

    It is the seed whose gain is nearest to the prompt's mean, so that what is seen is what is said.
    """

    def __init__(self, folder: Path, result: Mapping[str, Any], measure: str, sign: int, videos: Media):
        self.folder, self.measure, self.sign, self.videos = folder, measure, sign, videos
        self.rows = read_text_table(folder / "videos.csv")
        self.labels = {BASE: "base model"} | {a["name"]: a["name"] for a in result["adapters"]}

    def __call__(self, line: Mapping[str, Any]) -> Pair:
        own = [row for row in self.rows if int(row["index"]) == line["index"]]
        gain = line[f"{self.measure}_gain"]
        seed = self.typical_seed(own, line["adapter"], gain or 0.0)
        shown = []
        for row in own:
            if row["seed"] == seed:
                file = self.folder / row["file"]
                kind = kind_of_media(file)
                score = f"{self.measure} {number(float(row[self.measure]))}"
                shown.append(
                    Shown(self.labels[row["variant"]], self.videos.uri(file), kind, score, row["file"])
                )
        status = {"yes": "trained on", "no": "held out", "unknown": "training unknown"}[line["in_training"]]
        better = None if not gain else self.sign * gain > 0
        note = f"{status} · seed {seed}"
        return Pair(line["prompt"], note, f"mean gain {signed(gain)}", better, shown)

    def typical_seed(self, rows: Sequence[Mapping[str, str]], adapter: str, mean: float) -> str:
        scores = {(row["variant"], row["seed"]): float(row[self.measure]) for row in rows}
        seeds = dict.fromkeys(row["seed"] for row in rows)
        return min(seeds, key=lambda seed: abs(scores[adapter, seed] - scores[BASE, seed] - mean))


def validation_films(run: Path, validation: Sequence[Mapping], videos: Media) -> dict[str, Any] | None:
    """The first validation's videos beside those of a chosen step: what each step is called, and the prompts' pairs."""
    folders = sorted(folder for folder in run.glob("samples/step_*") if read_manifest(folder))
    if len(folders) < 2:
        return None
    made = [{entry["name"]: entry for entry in read_manifest(folder)} for folder in folders]
    rewards = {f"{row['step']:.0f}": row["reward"] for row in validation}
    steps = [str(int(folder.name.removeprefix("step_"))) for folder in folders]
    names = [
        f"step {step}" + (f" · reward {number(rewards[step])}" if step in rewards else "") for step in steps
    ]
    pairs: list[Pair] = []
    for name, entry in list(made[0].items())[:UNSELECTED_PROMPTS]:
        shown: dict[int, Shown] = {}
        for place in spread(len(folders)):
            if name in made[place]:
                file = folders[place] / made[place][name]["file"]
                shown[place] = Shown(
                    f"step {steps[place]}", videos.uri(file), kind_of_media(file), "", str(file.relative_to(run)),
                    step=place or None,
                )  # fmt: skip
        if pairs and any(video.uri is None for video in shown.values()):
            break  # fewer prompts, each with all its steps
        if len(shown) > 1:
            pairs.append(
                Pair(entry["prompt"], f"seed {entry['seed']}", "", None, [shown[k] for k in sorted(shown)])
            )
    return {"names": names, "pairs": pairs} if pairs else None


def spread(count: int) -> list[int]:
    """0 to ``count - 1`` from the ends inwards, each further place in the middle of a gap."""
    order, gaps = [0, count - 1], [(0, count - 1)]
    for low, high in gaps:  # grows while it is gone through
        middle = (low + high) // 2
        if low < middle:
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return order


def config_rows(values: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """(key, value, whether it differs from the default) of the resolved configuration."""
    try:
        plain = json.loads(json.dumps(Config.of(values).defaults()))
    except ValueError:  # of a model family that is not registered here
        plain = {}
    return [
        (key, repr(value), json.loads(json.dumps(value, default=str)) != plain.get(key))
        for key, value in values.items()
    ]


def warnings(log: Path) -> list[str]:
    """Distinct warnings and errors of the log, the last ones."""
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line.split(" ", 2)[2] for line in lines if " WARNING " in line or " ERROR " in line]
    told = [text.removeprefix("WARNING ").removeprefix("ERROR ") for text in told]
    return list(dict.fromkeys(told))[-12:]


def newest_manifest(run: Path) -> dict[str, Any] | None:
    """Step and hashes of the newest checkpoint."""
    manifests = sorted(run.glob("checkpoints/step_*/manifest.json"))
    if not manifests:
        return None
    try:
        hashes = read_object(manifests[-1])["sha256"]
    except (ValueError, KeyError) as error:
        logger.warning("%s is left out of the report: %s", manifests[-1], error)
        return None
    shown = hashes if isinstance(hashes, dict) else {}
    return {"folder": str(manifests[-1].parent.relative_to(run)), "sha256": shown}
