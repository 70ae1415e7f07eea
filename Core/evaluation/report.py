"""One self-contained HTML page about a run: curves, gains with intervals, videos side by side, how to repeat it.

Everything shown is read from files of the run folder, and the page names the file under each figure.
"""

import base64
import csv
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from Core.config import BASE, Config
from Core.config.files import RERUN, RESOLVED, read_run
from Core.data.video import smaller
from Core.evaluation.charts import Line, line_chart, stack_chart
from Core.generation.manifest import read_manifest
from Core.utils.damage import reason_of
from Core.utils.environment import read_starts
from Core.utils.files import read_object, write_whole
from Core.utils.tables import read_table, read_text_table

logger = logging.getLogger("vader")
REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("report_page.html")
# Bytes of video in the page; base64 adds a third, and the page stays below 20 MB.
VIDEO_BUDGET = 12_000_000
SELECTED_PROMPTS, UNSELECTED_PROMPTS = 3, 6
LISTED_PROMPTS = 200
REENCODED_WIDTH, REENCODED_CRF = 320, 30
EMBEDDED = {".mp4": "video/mp4", ".png": "image/png"}
TITLES = {
    "reward": "Reward",
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "seconds": "Seconds per step",
}


@dataclass(frozen=True)
class Chart:
    """An SVG element, its title, and the files and columns it was drawn from."""

    title: str
    svg: Markup
    source: str


@dataclass(frozen=True)
class Shown:
    """A video in the page: what made it, its data URI (None for one left out), its score, its file."""

    label: str
    uri: str | None
    kind: str
    score: str
    file: str


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
    evaluation = next((f for f in (run / "evaluation", run) if (f / "evaluation.json").is_file()), None)
    if evaluation is None and not (run / "metrics.csv").is_file():
        raise FileNotFoundError(
            f"{str(run)!r} has neither metrics.csv nor evaluation.json; give the folder of a run or an evaluation"
        )
    try:
        page = render(gather(run, evaluation))
    except (LookupError, TypeError, AttributeError, ValueError, csv.Error, jinja2.TemplateError) as error:
        if isinstance(error, ValueError) and str(run) in str(error):
            raise
        tables = ", ".join(str(path) for path in tables_of(run, evaluation))
        raise ValueError(
            f"one of {tables} is damaged ({reason_of(error)}); make it again, or move it away"
        ) from error
    write_whole(run / REPORT, page)
    return run / REPORT


def tables_of(run: Path, evaluation: Path | None) -> list[Path]:
    """The tables of a report that are there."""
    places = [run / "metrics.csv", run / "validation.csv"]
    places += [evaluation / name for name in ("evaluation.json", "videos.csv")] if evaluation else []
    return [path for path in places if path.exists()]


def render(content: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "signed": signed, "percent": lambda share: f"{share:.0%}"}
    template = TEMPLATE.read_text(encoding="utf-8")
    return environment.from_string(template).render(content, policy=content_policy(template))


def content_policy(template: str) -> str:
    """Content-Security-Policy of the page: its own script by hash, what is inside the page, and no network."""
    script = template[template.index("<script>") + len("<script>") : template.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "media-src data:; base-uri 'none'; form-action 'none'"
    )


def gather(run: Path, evaluation: Path | None) -> dict[str, Any]:
    """Everything the template shows."""
    metrics, validation = read_rows(run / "metrics.csv"), read_rows(run / "validation.csv")
    result = read_object(evaluation / "evaluation.json") if evaluation else None
    values = saved_values(run)
    videos = VideoBudget(VIDEO_BUDGET, run)
    relative = "" if evaluation in (None, run) else "evaluation/"
    return {
        "name": run.resolve().name,
        "facts": facts(metrics, values),
        "measures": measure_rows(result) if result else [],
        "headline": headline(result, metrics, validation),
        "few_prompts": result["prompts"] < 8 if result else False,
        "evaluation": result,
        "relative": relative,
        "groups": evaluation_groups(evaluation, result, videos)
        if evaluation and result
        else validation_groups(run, videos),
        "charts": list(charts(metrics, validation)),
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


def number(value: float | None, digits: int = 4) -> str:
    """A figure with as many digits as mean something; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 else text


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


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
        found += [("steps", f"{metrics[-1]['step']:.0f}"), ("in training steps", duration(sum(seconds)))]
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


def measure_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of gains, each with the geometry of its interval on a scale of -1 to 1."""
    rows = []
    for row in result["summary"]:
        extent = max(abs(row["low"] or 0), abs(row["high"] or 0), 1e-12) * 1.1
        lower = row["measure"] in result["lower_is_better"]
        verdict = None
        if row["significant"]:
            verdict = "better" if (row["gain"] > 0) != lower else "worse"
        if row["measure"] in ("motion", "sharpness", "diversity"):
            verdict = verdict and "changed"
        place = {key: 50 + 50 * (row[key] or 0) / extent for key in ("low", "gain", "high")}
        rows.append(row | {"verdict": verdict, "place": place, "lower": lower})
    return rows


def charts(metrics: Sequence[Mapping], validation: Sequence[Mapping]) -> Iterator[Chart]:
    """Curves of what there is: the usual ones first, then monitors."""
    columns = set(metrics[0]) if metrics else set()
    parts = sorted(name for name in columns if name.startswith("seconds_"))
    for key, title in TITLES.items():
        lines, sources = [], []
        if key in columns:
            lines.append(curve("training", metrics, key, smooth=key not in ("lr", "seconds")))
            sources.append(f"metrics.csv: {key}")
        if validation and key in validation[0]:
            lines.append(curve("validation", validation, key, dots=True))
            sources.append(f"validation.csv: {key}")
        if key == "seconds" and parts:
            stacked = {
                name.removeprefix("seconds_").replace("_", " "): column(metrics, name) for name in parts
            }
            svg = stack_chart(key, column(metrics, "step"), stacked)
            yield Chart(title, Markup(svg), f"metrics.csv: {', '.join(parts)}")
        elif lines:
            yield Chart(title, Markup(line_chart(key, lines)), "; ".join(sources))
    for key in validation[0] if validation else ():
        # A reward of a single part has that part's curve already.
        if key != "step" and column(validation, key) != column(validation, "reward"):
            svg = line_chart(f"monitor-{key}", [curve("validation", validation, key, dots=True)])
            yield Chart(f"Validation: {key.replace('_', ' ')}", Markup(svg), f"validation.csv: {key}")


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
        self.left, self.each, self.root = total, total // 40, root.resolve()

    def uri(self, file: Path) -> str | None:
        """The file's content as a data URI; None when it does not fit any more, is gone, or is no video of the run."""
        if not self.belongs(file):
            logger.warning(
                "left out of the report, since it is gone or no video that this run made: %s", file
            )
            return None
        content = file.read_bytes()
        if len(content) > self.each and file.suffix == ".mp4":
            content = smaller(file, REENCODED_WIDTH, REENCODED_CRF)
        if len(content) > self.left:
            return None
        self.left -= len(content)
        return f"data:{EMBEDDED[file.suffix]};base64,{base64.b64encode(content).decode()}"

    def belongs(self, file: Path) -> bool:
        """Whether it is a video inside the run's folder, and one that the ``prompts.jsonl`` beside it names."""
        inside = file.resolve().is_relative_to(self.root) and file.suffix in EMBEDDED
        return inside and any(entry["file"] == file.name for entry in read_manifest(file.parent))


def evaluation_groups(
    folder: Path, result: Mapping[str, Any], videos: VideoBudget
) -> list[tuple[str, str, list[Pair]]]:
    """Videos of the most improved, the most harmed and some unselected prompts: title, explanation, pairs."""
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
        ("Most improved", explained, improved),
        ("Most harmed", explained, harmed),
    ]
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

    def __init__(self, folder: Path, result: Mapping[str, Any], measure: str, sign: int, videos: VideoBudget):
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
                kind = "video" if file.suffix == ".mp4" else "image"
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


def validation_groups(run: Path, videos: VideoBudget) -> list[tuple[str, str, list[Pair]]]:
    """Validation videos of the first and the last step, where nothing was evaluated."""
    folders = sorted(folder for folder in run.glob("samples/step_*") if read_manifest(folder))
    if len(folders) < 2:
        return []
    first, last = folders[0], folders[-1]
    after = {entry["name"]: entry for entry in read_manifest(last)}
    pairs = []
    for entry in read_manifest(first)[:UNSELECTED_PROMPTS]:
        if entry["name"] in after:
            shown = []
            for folder in (first, last):
                file = folder / entry["file"]
                step = int(folder.name.removeprefix("step_"))
                kind = "video" if file.suffix == ".mp4" else "image"
                name = str(file.relative_to(run))
                shown.append(Shown(f"step {step}", videos.uri(file), kind, "", name))
            pairs.append(Pair(entry["prompt"], f"seed {entry['seed']}", "", None, shown))
    return [("Validation videos", "first and last step, same prompts and seeds", pairs)] if pairs else []


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
