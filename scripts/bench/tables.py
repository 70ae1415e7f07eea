"""Tables in Markdown of what a benchmark measured."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

GIB = 2**30


def rows(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in cells)


def run_table(result: dict[str, Any]) -> str:
    lines = []
    for name, phase in result["phases"].items():
        rate = phase["operations"] / phase["seconds"] if phase["seconds"] else 0.0
        lines.append(
            (
                name.replace("_", " "),
                f"{phase['seconds']:.4f}",
                f"{phase['peak_bytes'] / GIB:.2f}",
                f"{phase['operations'] / 1e12:.4f}",
                f"{phase['bytes'] / 1e9:.2f}",
                f"{rate / 1e12:.4f}",
                f"{rate / result['ceiling']:.0%}",
                f"{phase['roofline_seconds']:.4f}",
            )
        )
    header = (
        "phase",
        "seconds",
        "peak GiB",
        "TFLOP",
        "GB moved",
        "TFLOP/s",
        "of the ceiling",
        "roofline seconds",
    )
    return rows(header, lines)


def compare_table(result: dict[str, Any]) -> str:
    lines = [
        (
            f"`{side['setting']}`",
            f"{statistics.median(side['seconds']):.2f}",
            f"{statistics.median(side['cpu_seconds']):.2f}",
            f"{side['peak_bytes'] / GIB:.2f}",
        )
        for side in result["sides"]
    ]
    sides = rows(("setting", "seconds", "CPU seconds", "peak GiB"), lines)
    units = {"seconds": "wall time", "cpu_seconds": "CPU time"}
    said = [f"{_ratio(values)} in {units[unit]}" for unit, values in result["ratios"].items()]
    return f"{sides}\n\n`{result['sides'][1]['setting']}` takes {' and '.join(said)}; ratios are taken step by step."


def _ratio(values: Sequence[float]) -> str:
    """Median ratio and its range over the rounds."""
    spread = f"{min(values):.2f} to {max(values):.2f}, {len(values)} rounds"
    return f"{statistics.median(values):.2f} times as long ({spread})"


def roofline(result: dict[str, Any]) -> str:
    """Compare the time a run takes with the least its operations need."""
    total = {
        key: sum(phase[key] for phase in result["phases"].values())
        for key in ("seconds", "operations", "bytes", "roofline_seconds")
    }
    floor = total["operations"] / result["ceiling"]
    return (
        f"Roofline: {total['operations'] / 1e12:.2f} TFLOP and {total['bytes'] / 1e9:.1f} GB, counted per operator. "
        f"The machine reaches {result['ceiling'] / 1e12:.3f} TFLOP/s in a large {result['dtype']} matrix product and "
        f"copies {result['bandwidth'] / 1e9:.1f} GB/s. The arithmetic alone needs {floor:.2f} s; counting each "
        f"operator's memory traffic, without caches, {total['roofline_seconds']:.2f} s. The step takes "
        f"{total['seconds']:.2f} s, so it reaches {floor / total['seconds']:.0%} of the ceiling."
    )
