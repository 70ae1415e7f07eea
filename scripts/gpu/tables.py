"""What docs/performance.md shows of a proof: tables of what its parts measured, as far as each came."""

import statistics
from collections.abc import Callable
from typing import Any

from scripts.bench.tables import GIB, compare_table, roofline, rows, run_table
from scripts.gpu.parts import PRESETS
from scripts.gpu.predictor import COMPARED, step_peak

Result = dict[str, Any]
STORED = ("nf4", "fp8", "streamed")  # parts that store the weights of 240p in another way
SIZED = ("phases", "360p", "720p", *STORED, "wan-1.3b", "wan-ti2v-5b")  # parts with the cost of a step
# What is to hold: (what, unit, goal, whether more is better, the measured number).
Goal = tuple[str, str, float, bool, Callable[["Parts"], float]]


def title(name: str) -> str:
    """The preset that a part measures, and what it changes."""
    stored = f", {name}" if name in STORED else ""
    return PRESETS.get(name, PRESETS["240p"] + stored)


class Parts:
    """What the parts of a proof measured; KeyError where one did not come so far."""

    def __init__(self, proof: Result):
        self.parts = proof["parts"]

    def __getitem__(self, name: str) -> Result:
        return self.parts[name]["result"]

    def has(self, name: str, *keys: str) -> bool:
        return name in self.parts and all(key in self.parts[name].get("result", {}) for key in keys)


def memory(name: str) -> Callable[[Parts], float]:
    """GiB that PyTorch holds of the card, where it says so; else the peak."""
    return lambda parts: (parts[name]["reserved_bytes"] or parts[name]["peak_bytes"]) / GIB


def times_plain(parts: Parts) -> float:
    return statistics.median(parts["plain"]["ratios"]["seconds"])


def prefix_share(parts: Parts) -> float:
    """Percent of the ceiling that the steps without a gradient reach."""
    prefix = parts["phases"]["phases"]["prefix"]
    return 100 * prefix["operations"] / prefix["seconds"] / parts["phases"]["ceiling"]


GOALS: tuple[Goal, ...] = (
    ("240p, times as fast as `plain`", "", 3, True, times_plain),
    ("240p, steps without a gradient", "% of the ceiling", 50, True, prefix_share),
    ("240p, memory", " GiB", 16, False, memory("phases")),
    ("240p in 4 bits, memory", " GiB", 10, False, memory("nf4")),
    ("360p, memory", " GiB", 24, False, memory("360p")),
    ("720p, memory", " GiB", 80, False, memory("720p")),
)


def goals(parts: Parts) -> str:
    lines = []
    for what, unit, goal, more, measure in GOALS:
        wanted = f"{'≥' if more else '≤'} {goal:g}{unit}"
        try:
            value = measure(parts)
        except KeyError:
            lines.append((what, wanted, "not measured", ""))
            continue
        met = value >= goal if more else value <= goal
        lines.append((what, wanted, f"{value:.1f}{unit}", "yes" if met else "no"))
    return rows(("what", "goal", "measured", "met"), lines)


def machine(parts: Parts) -> str:
    found = parts["machine"]
    rates = ", ".join(f"{rate / 1e12:.1f} TFLOP/s in {name}" for name, rate in found["ceilings"].items())
    card = found.get("card")
    where = (
        f"{card['name']}, {card['memory'] / GIB:.0f} GiB, CUDA {card['cuda']}, driver {card['driver']}. "
        if card
        else ""
    )
    return f"{where}A large matrix product reaches {rates}; a copy moves {found['bandwidth'] / 1e9:.0f} GB/s."


def costs(parts: Parts) -> str:
    """Seconds and memory of a step by size."""
    lines = []
    for name in SIZED:
        if not parts.has(name, "step_seconds"):
            continue
        cost = parts[name]
        steps = cost["sampling_steps"]
        lines.append(
            (
                title(name),
                " × ".join(map(str, cost["latent"])),
                steps,
                f"{statistics.median(cost['step_seconds']):.2f}",
                f"{cost['phase_seconds']['prefix'] / (steps - 1):.3f}",
                f"{cost['peak_bytes'] / GIB:.2f}",
                f"{cost['reserved_bytes'] / GIB:.2f}" if cost["reserved_bytes"] else "",
            )
        )
    header = ("step of", "latent", "sampling steps", "seconds", "seconds a step without a gradient")
    return rows((*header, "peak GiB", "reserved GiB"), lines)


def prefix(parts: Parts) -> str:
    """The steps without a gradient as a graph, and compiled."""
    lines = []
    for name, key in (("graph", "graph_seconds"), ("compile", "compiled_seconds")):
        if parts.has(name, "eager_seconds", key):
            found = parts[name]
            ratio = found["eager_seconds"] / found[key]
            lines.append((name, f"{found['eager_seconds']:.3f}", f"{found[key]:.3f}", f"{ratio:.2f}"))
    return rows(("prefix as", "eager seconds", "seconds", "times as fast"), lines)


def checks(parts: Parts) -> str:
    lines = []
    for name in ("kernels", "runs"):
        for test in parts[name].get("tests", []) if parts.has(name) else []:
            recorded = ", ".join(f"{key} {_short(value)}" for key, value in test["recorded"].items())
            lines.append((f"`{test['name']}`", test["outcome"], recorded or test["message"]))
    return rows(("test", "outcome", "recorded"), lines)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def predictions(parts: Parts) -> str:
    """Predicted and measured peaks, and how far the first is off."""
    found = parts["predictor"].get("predictions", {}) if parts.has("predictor") else {}
    lines = []
    for name in COMPARED:
        predicted = step_peak(found.get(name, {}))
        if predicted is not None and parts.has(name, "peak_bytes"):
            measured = parts[name]["peak_bytes"]
            sizes = (f"{size / GIB:.2f}" for size in (predicted, measured))
            lines.append((name, *sizes, f"{predicted / measured - 1:+.1%}"))
    return rows(("step", "predicted GiB", "measured GiB", "difference"), lines)


def course(parts: Parts) -> str:
    """How each part ended."""
    lines = [
        (name, part["status"], f"{part.get('seconds', 0):.0f}", _reason(part))
        for name, part in parts.parts.items()
    ]
    return rows(("part", "status", "seconds", "reason"), lines)


def _reason(part: Result) -> str:
    """Why a part has no result, or not all of it."""
    missing = part.get("result", {}).get("missing")
    return missing or (part.get("log") or [""])[-1].replace("|", "\\|")


def text(proof: Result) -> str:
    """All tables that have a line."""
    parts = Parts(proof)
    blocks = [machine(parts), goals(parts), costs(parts)]
    if parts.has("phases", "phases"):
        blocks += [run_table(parts["phases"]), roofline(parts["phases"])]
    if parts.has("plain", "sides"):
        blocks.append(compare_table(parts["plain"]))
    blocks += [prefix(parts), checks(parts), predictions(parts), course(parts)]
    return "\n\n".join(block for block in blocks if not _is_empty(block))


def _is_empty(block: str) -> bool:
    """Whether it is a table of nothing but its header."""
    return block.startswith("|") and block.count("\n") < 2


def bars(proof: Result) -> dict[str, float]:
    """Seconds of a step by size."""
    parts = Parts(proof)
    measured = [name for name in SIZED if parts.has(name, "step_seconds")]
    return {title(name): statistics.median(parts[name]["step_seconds"]) for name in measured}
