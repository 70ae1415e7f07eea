"""docs/performance.md from docs/benchmarks/*.json: tables and pictures are the files' numbers, and only theirs."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "performance.md"
GIB = 2**30

HEAD = """# Performance

Written by `python scripts/benchmark.py --write-docs` from the files in `docs/benchmarks`; each holds the command, the
machine and the versions it was measured with. Weights are random: the cost of a step does not depend on what they are.

A step samples N − K steps without a gradient (`prefix`), K with one (`gradient_steps`), decodes, scores, and goes back.
`cpu-twin` is one of XL/2's 28 layers at its full width and 240p, with one layer each of T5-XXL and ViT-H, a VAE of a
fiftieth of the operations, 17 frames and 10 steps. `plain` is the same step without the savings listed
[below](#what-is-saved).
"""

SAVED = """## What is saved

| on by default | plain path | the result |
| --- | --- | --- |
| captions encoded once, kept on disk, the encoder freed | encoder resident and run at every step | the same numbers |
| text keys and values computed once without a gradient, once with | once per sampling step | the same latent |
| fused attention | score matrix in float32 | rounding |
| no frame mask where all frames are generated | modulation by frame, twice | the same numbers |
| blocks checkpointed, once | whole step and blocks | the same numbers |
| frozen weights in bf16 | float32 | bf16 rounding |
| in the prefix the adapter added in place, by one product | PEFT's layer: copy, two products, scale, add | rounding |
| convolutions of the frozen VAE keep no input | PyTorch keeps it for a weight's gradient | the same numbers |
| modulation, gates, rotary position, on a GPU norms, in one to three operations | in two to nine | rounding |
| tokens in memory as the blocks read them | as the patch embedding's convolution leaves them, transposed | rounding |

`tests/test_exact_options.py` undoes one by one what of these is in the denoiser and the VAE, sees that other operations
run then, and holds the final latent to a relative 1e-5 in float32 (2e-2 in bf16) and the adapter's gradient to 1e-4
(2e-2, of a projection of the latent). Frozen linear layers keep nothing for a weight's gradient by themselves; the same
tests count what autograd saves. Where the weights are in autocast's dtype the prefix runs without it, as inference
does: on a GPU PyTorch would run its norms in float32.

How much of the time the bf16 weights save, and how much the rest, is measured by comparisons in one dtype
([both in float32](#cpu-twin-fp32-compare), [both in bf16](#cpu-twin-bf16-compare)).

By choice: `compile_blocks` compiles the denoiser's blocks; `grad_checkpoint="keep_attention"` leaves attention out of
what is computed again; `prefix_steps` and `prefix_cache` take fewer or cheaper steps before the gradient window;
`decode_context="causal"` scores a frame of the finished video; `dtype="fp8"` and `base_quant="nf4"` store the frozen
denoiser in 8 and 4 bits; `guidance_grad="cond"` halves the graph of the gradient steps. Those of them that change the
result are measured under [demo approximations](#demo-approximations).
"""

LEFT_OUT = """## What was left out

- **Time and fps embeddings for all steps at once.** They are two rows through five linear layers, beside thousands
  through every block.
- **Compiling by default.** On a CPU a step of compiled blocks takes [about as long](#cpu-twin-compiled-compare) as one
  with the fused adapter, which it replaces by its own, and the first takes longer. Whether it pays on a GPU has not
  been measured.
- **CUDA graphs, 8-bit products, preparing the next batch while a GPU works.** There was no GPU to measure them on.
  Drawing a step's noise, all there is to prepare, takes milliseconds (`scripts/measure_overhead.py`).
- **Saving in the background.** A checkpoint is the adapter and its two moments, 0.11 GB for XL/2 at rank 16; it is
  written, and its hash taken, before the next step begins, so that what was reported as saved is on disk.
- **The adapter merged into the weights for the prefix.** In bf16 a change below half the spacing of a weight is lost,
  so that a young adapter would not be there at all.
- **bitsandbytes' own 4-bit layer.** On a CPU it switches to a kernel without a gradient; `base_quant` uses its packing
  and widens the weight itself.
"""


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


def rows(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in cells)


def table(result: dict[str, Any]) -> str:
    """The table of a result of any kind."""
    return KINDS[result["kind"]].table(result)


def deliver(result: dict[str, Any], path: Path | None) -> None:
    """Print the table of a result, and write the result to ``path`` if there is one."""
    from Core.evaluation.score_videos import write_json

    print(table(result))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)


def _run_table(result: dict[str, Any]) -> str:
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
        "T operations",
        "GB moved",
        "T/s",
        "of the ceiling",
        "roofline seconds",
    )
    return rows(header, lines)


def _compare_table(result: dict[str, Any]) -> str:
    lines = [
        (
            f"`{side['setting']}`",
            f"{statistics.median(side['seconds']):.2f}",
            f"{statistics.median(side['cpu_seconds']):.2f}",
            f"{side['peak_bytes'] / GIB:.2f}",
        )
        for side in result["sides"]
    ]
    sides = rows(("setting", "seconds", "processor seconds", "peak GiB"), lines)
    said = [f"{_ratio(values)} by {unit.replace('_', ' ')}" for unit, values in result["ratios"].items()]
    return f"{sides}\n\n`{result['sides'][1]['setting']}` takes {' and '.join(said)}, step by step."


def _ratio(values: Sequence[float]) -> str:
    """Median ratio with the range over all rounds."""
    spread = f"{min(values):.2f} to {max(values):.2f}, {len(values)} rounds"
    return f"{statistics.median(values):.2f} times as long ({spread})"


def _sweep_table(result: dict[str, Any]) -> str:
    lines = [
        (f"{p['value']:g}", f"{p['seconds']:.3f}", f"{p['peak_bytes'] / GIB:.2f}") for p in result["points"]
    ]
    fit, memory = result["lines"]["seconds"], result["lines"]["peak_bytes"]
    points = rows((result["quantity"], "seconds", "peak GiB"), lines)
    return (
        f"{points}\n\n{fit['intercept']:.3f} s + {fit['slope']:.4g} s for each {result['unit']} "
        f"(r² = {fit['r2']:.3f}); {memory['slope'] / GIB:.3g} GiB for each {result['unit']}."
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
        "times as fast",
        "latents off by",
        "velocity off by",
        "cosine of the gradient",
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
        rows(("processes", "seconds", "share of the all-reduce"), lines)
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
        + f"\n\nDifferences are paired video by video, of {result['prompts']} held-out prompts; the base model is "
        "that of the path, stored as in its training."
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
    """How results of a kind are shown: a table, and bars of seconds or else a line through points."""

    table: Callable[[dict[str, Any]], str]
    bars: Callable[[dict[str, Any]], dict[str, float]] | None


# In the order of the page.
KINDS = {
    "compare": Kind(_compare_table, _side_bars),
    "run": Kind(_run_table, _phase_bars),
    "paths": Kind(_paths_table, _path_bars),
    "options": Kind(_options_table, _option_bars),
    "scaling": Kind(_scaling_table, _scaling_bars),
    "sweep": Kind(_sweep_table, None),
}


def roofline(result: dict[str, Any]) -> str:
    """Where a run stands between what its operations need at least and what it takes."""
    total = {
        key: sum(phase[key] for phase in result["phases"].values())
        for key in ("seconds", "operations", "bytes", "roofline_seconds")
    }
    floor = total["operations"] / result["ceiling"]
    return (
        f"Roofline: {total['operations'] / 1e12:.2f} T operations and {total['bytes'] / 1e9:.1f} GB, counted at every "
        f"operator. The machine does {result['ceiling'] / 1e12:.3f} T/s in a large {result['dtype']} product and "
        f"copies {result['bandwidth'] / 1e9:.1f} GB/s. Products alone need {floor:.2f} s; with the bytes of each "
        f"operator from memory, none from a cache, {total['roofline_seconds']:.2f} s; the step takes "
        f"{total['seconds']:.2f} s, that is {floor / total['seconds']:.0%} of the ceiling."
    )


def picture(result: dict[str, Any], path: Path) -> None:
    """Seconds by phase, by side, or against the swept quantity."""
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
            axes.set(xlabel=result["quantity"], ylabel="seconds", ylim=(0, None))
        else:
            bars = show(result)
            axes.barh(list(bars)[::-1], list(bars.values())[::-1])
            axes.set(xlabel="seconds")
        figure.savefig(path, metadata={"Date": None})


def section(path: Path, result: dict[str, Any]) -> str:
    cpu = result["hardware"]
    used = (
        "a core for each process"
        if result["kind"] == "scaling"
        else f"{result['threads']} of {cpu['cores']} cores"
    )
    where = ", ".join(cpu["gpus"]) or f"{cpu['cpu']}, {used}"
    parts = [
        f"### {path.stem.replace('-', ' ').replace('_', ' ')}",
        f"`{result['command']}` on {where}; PyTorch {result['versions']['torch']}.",
        table(result),
    ]
    if result["kind"] == "run":
        parts.append(roofline(result))
    return "\n\n".join([*parts, f"![{result['kind']} of {result['preset']}](benchmarks/{path.stem}.svg)"])


def text() -> str:
    """The whole page."""
    results = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    order = list(KINDS)
    ordered = sorted(results, key=lambda path: (order.index(results[path]["kind"]), path.name))
    measured = ["## Measured", *(section(path, results[path]) for path in ordered)]
    return "\n".join([HEAD, SAVED, LEFT_OUT, "\n\n".join(measured)]) + "\n"


def write() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob("*.json"):
        picture(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".svg"))
    PAGE.write_text(text(), encoding="utf-8")
