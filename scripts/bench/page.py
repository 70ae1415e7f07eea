"""Write the measured part of docs/performance.md: its tables and plots come from docs/benchmarks/*.json."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.tables import GIB, compare_table, roofline, rows, run_table
from scripts.gpu import tables

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "performance.md"

BEGIN = "<!-- measured: written by scripts/benchmark.py --write-docs -->"
NO_GPU = (
    "No figure on this page is from a GPU; [Measure and test on your GPU](gpu.md) says how to measure yours."
)

# Name of a file → heading; others get their name.
TITLES = {
    "cpu-twin-compare": "Default against plain",
    "cpu-twin-fp32-compare": "Default against plain, both in float32",
    "cpu-twin-bf16-compare": "Default against plain, both in bf16",
    "cpu-twin-compiled-compare": "Compiled blocks against the default",
    "cpu-twin-default": "A default step by phase",
    "cpu-twin-plain": "A plain step by phase",
    "demo-nothing-lost": "Learning with each saving left out",
    "demo-approximations": "Approximations",
    "demo-scaling": "Two processes",
}


def fit_line(points: Sequence[dict[str, float]], key: str) -> dict[str, float]:
    """Least squares through (value, ``key``): slope, intercept, and r² (1 for points on a line)."""
    x, y = (np.array([point[name] for point in points]) for name in ("value", key))
    slope, intercept = np.polyfit(x, y, 1)
    spread = ((y - y.mean()) ** 2).sum()
    rest = ((y - slope * x - intercept) ** 2).sum()
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "r2": float(1 - rest / spread) if spread else 1.0,
    }


def table(result: dict[str, Any]) -> str:
    """The table for a result, by its kind."""
    return KINDS[result["kind"]].table(result)


def deliver(result: dict[str, Any], path: Path | None) -> None:
    """Print a result's table; also write the result to ``path`` if given."""
    from Core.evaluation.score_videos import write_json

    print(table(result))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)


def swept(result: dict[str, Any]) -> str:
    """What the values of a sweep count, as a column's head."""
    quantity, unit = result["quantity"], result["unit"]
    return quantity if unit in quantity else f"{unit}s"


def _sweep_table(result: dict[str, Any]) -> str:
    lines = [
        (f"{p['value']:g}", f"{p['seconds']:.3f}", f"{p['peak_bytes'] / GIB:.2f}") for p in result["points"]
    ]
    fit, memory = result["lines"]["seconds"], result["lines"]["peak_bytes"]
    points = rows((swept(result), "seconds", "peak GiB"), lines)
    return (
        f"{points}\n\nLinear fit: {fit['intercept']:.3f} s + {fit['slope']:.4g} s per {result['unit']} "
        f"(r² = {fit['r2']:.3f}); {memory['slope'] / GIB:.3g} GiB per {result['unit']}."
    )


def _options_table(result: dict[str, Any]) -> str:
    lines = [
        (
            f"`{row['option']}`",
            f"{row['seconds']:.2f}",
            "{:.2f} ({:.2f} to {:.2f})".format(*row["times_as_fast"]),
            f"{row['latent_distance']:.2%}",
            f"{row['velocity_error']:.2%}",
            f"{row['gradient_cosine']:.3f}",
        )
        for row in result["rows"]
    ]
    header = (
        "option",
        "seconds",
        "speedup",
        "latent error",
        "velocity error",
        "gradient cosine",
    )
    return rows(header, lines)


def _scaling_table(result: dict[str, Any]) -> str:
    efficiencies = [
        one["seconds"] / two["seconds"] / 2 for one, two in zip(result["one"], result["two"], strict=True)
    ]
    lines = [
        (
            processes,
            f"{statistics.median(run['seconds'] for run in result[key]):.3f}",
            f"{statistics.median(run['all_reduce_share'] for run in result[key]):.2%}",
        )
        for processes, key in ((1, "one"), (2, "two"))
    ]
    spread = f"{min(efficiencies):.1%} to {max(efficiencies):.1%}, {len(efficiencies)} rounds"
    return (
        rows(("processes", "seconds", "all-reduce share"), lines)
        + f"\n\nEfficiency of two processes: {statistics.median(efficiencies):.1%} ({spread})."
    )


def _paths_table(result: dict[str, Any]) -> str:
    lines = [
        (
            f"`{row['path']}`",
            f"{row['seconds']:.0f}",
            f"{row['reward']:.1f}",
            *(
                f"{gain['gain']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f})"
                for gain in (row["gain"], row["over_plain"])
            ),
        )
        for row in result["rows"]
    ]
    header = ("path", "seconds of training", "reward", "over the base model", "over the plain path")
    return (
        rows(header, lines)
        + f"\n\nDifferences are paired per video on {result['prompts']} held-out prompts; each path has its own base "
        "model, stored as in its training."
    )


def _path_bars(result: dict[str, Any]) -> dict[str, float]:
    return {row["path"]: row["seconds"] for row in result["rows"]}


def _phase_bars(result: dict[str, Any]) -> dict[str, float]:
    return {name: phase["seconds"] for name, phase in result["phases"].items()}


def _side_bars(result: dict[str, Any]) -> dict[str, float]:
    return {side["setting"]: statistics.median(side["seconds"]) for side in result["sides"]}


def _option_bars(result: dict[str, Any]) -> dict[str, float]:
    return {row["option"]: row["seconds"] for row in result["rows"]}


def _scaling_bars(result: dict[str, Any]) -> dict[str, float]:
    names = {"one": "one process", "two": "two processes"}
    return {name: statistics.median(run["seconds"] for run in result[key]) for key, name in names.items()}


@dataclass(frozen=True)
class Kind:
    """How to show results of one kind: a table, and either bars of seconds or, if None, points with a fitted line."""

    table: Callable[[dict[str, Any]], str]
    bars: Callable[[dict[str, Any]], dict[str, float]] | None


# In page order.
KINDS = {
    "proof": Kind(tables.text, tables.bars),
    "compare": Kind(compare_table, _side_bars),
    "run": Kind(run_table, _phase_bars),
    "paths": Kind(_paths_table, _path_bars),
    "options": Kind(_options_table, _option_bars),
    "scaling": Kind(_scaling_table, _scaling_bars),
    "sweep": Kind(_sweep_table, None),
}


def picture(result: dict[str, Any], path: Path) -> None:
    """Plot seconds by phase, by setting, or against the swept quantity."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": path.stem, "figure.constrained_layout.use": True, "font.size": 9}):
        figure = Figure(figsize=(6.4, 2.4))
        axes = figure.add_subplot()
        show = KINDS[result["kind"]].bars
        if show is None:
            x = [point["value"] for point in result["points"]]
            line = result["lines"]["seconds"]
            axes.plot(x, [point["seconds"] for point in result["points"]], "o")
            axes.plot(x, [line["intercept"] + line["slope"] * value for value in x])
            axes.set(xlabel=swept(result), ylabel="seconds", ylim=(0, None))
        else:
            bars = show(result)
            axes.barh(list(bars)[::-1], list(bars.values())[::-1])
            axes.set(xlabel="seconds")
        figure.savefig(path, metadata={"Date": None})


def title(path: Path, result: dict[str, Any]) -> str:
    if result["kind"] == "sweep":
        return f"More {swept(result)}"
    return TITLES.get(path.stem) or path.stem.replace("-", " ").replace("_", " ")


def section(path: Path, result: dict[str, Any]) -> str:
    cpu = result["hardware"]
    used = (
        "one core per process"
        if result["kind"] == "scaling"
        else f"{result.get('threads', cpu['cores'])} of {cpu['cores']} cores"
    )
    where = ", ".join(cpu["gpus"]) or f"{cpu['cpu']}, {used}"
    code = f", commit {result['commit'][:7]}" if result.get("commit") else ""
    parts = [
        f"### {title(path, result)}",
        f"`{result['command']}` on {where}; PyTorch {result['versions']['torch']}{code}.",
        table(result),
    ]
    if result["kind"] == "run":
        parts.append(roofline(result))
    return "\n\n".join([*parts, f"![{result['kind']} of {result['preset']}](benchmarks/{path.stem}.svg)"])


def text() -> str:
    """The whole page: its own prose, and behind the marker all that was measured.

    Raises:
        ValueError: a proof that ran without a GPU, or at small sizes.
    """
    results = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    for path, result in results.items():
        if result["kind"] == "proof" and (result["small"] or not result.get("hardware", {}).get("gpus")):
            raise ValueError(f"{path} is no proof on a GPU at full size; delete it, or run prove.sh on one")
    order = list(KINDS)
    ordered = sorted(results, key=lambda path: (order.index(results[path]["kind"]), path.name))
    prose = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0]
    on_gpu = any(result["hardware"]["gpus"] for result in results.values())
    notes = [] if on_gpu else [NO_GPU]
    return (
        "\n\n".join([f"{prose}{BEGIN}", *notes, *(section(path, results[path]) for path in ordered)]) + "\n"
    )


def write() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob("*.json"):
        picture(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".svg"))
    PAGE.write_text(text(), encoding="utf-8")
