"""Benchmark a training step with random weights: benchmark.py PRESET [--setting S] [--json FILE].

PRESET is cpu-twin or wan-twin, or on a GPU xl2-240p, xl2-360p, xl2-720p, wan-1.3b-480p or wan-ti2v-5b-480p. A setting
is `default` or `plain` (the step without this project's savings), followed by `;key=value` for each config key to
change: `default;decode_context=causal`.

    benchmark.py cpu-twin                                phases of the default step, as a table and as JSON
    benchmark.py cpu-twin --compare default plain        alternate two settings and report the ratio of their times
    benchmark.py cpu-twin --sweep steps                  cost against steps, window, frames, resolution, rank or batch
    benchmark.py --write-docs                            write docs/performance.md from docs/benchmarks/*.json
"""

import argparse
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from scripts.bench import page  # noqa: E402
from scripts.bench.presets import PRESETS, Setting  # noqa: E402

# Sweeps that take up to a quarter of an hour on two CPU cores: name → (unit, [(value, changes)]).
SWEEPS: dict[str, tuple[str, list[tuple[float, str]]]] = {
    "steps": ("sampling step", [(n, f"scheduler.num_sampling_steps={n}") for n in (5, 10, 20, 30)]),
    "window": ("gradient step", [(n, f"backprop_steps={n}") for n in (1, 2, 3, 4)]),
    "frames": ("frame", [(n, f"num_frames={n}") for n in (17, 34, 51)]),
    "resolution": ("megapixel", [(n * n / 1e6, f"image_size=({n},{n})") for n in (128, 192, 256, 320)]),
    "rank": ("rank", [(n, f"lora_rank={n}") for n in (4, 16, 64, 128)]),
    "batch": ("video", [(n, f"train_batch_size={n}") for n in (1, 2, 3)]),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", nargs="?", choices=list(PRESETS), help="what to measure")
    parser.add_argument("--setting", help="setting to measure it with (default: default)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two settings, alternating step by step"
    )
    which.add_argument("--sweep", choices=list(SWEEPS), help="cost as one quantity varies")
    parser.add_argument("--steps", type=int, default=3, help="steps to measure per setting (default 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", type=Path, help="also write the result there")
    parser.add_argument("--write-docs", action="store_true", help="write docs/performance.md and its plots")
    args = parser.parse_args(argv)
    if bool(args.preset) == args.write_docs:
        parser.error("give a preset to measure, or --write-docs alone")
    for name in ("steps", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.compare and args.setting:
        parser.error("--compare names its two settings itself; leave --setting out")
    args.setting = args.setting or "default"
    return args


def run(preset: str, setting: str, steps: int) -> dict[str, Any]:
    """Measure one setting by phase.

    Raises:
        RuntimeError: the step is quicker than the machine's ceiling allows, so that one of the two is wrong.
    """
    from scripts.bench.bench import Worker

    worker = Worker(preset, setting)
    measured = worker.measure(steps)
    worker.close()
    operations, seconds = (
        sum(phase[key] for phase in measured["phases"].values()) for key in ("operations", "seconds")
    )
    if operations > seconds * measured["ceiling"]:
        raise RuntimeError(
            f"the step does {operations / seconds:.3g} operations a second, and the machine's ceiling was measured as "
            f"{measured['ceiling']:.3g}: something else was running then; repeat the command"
        )
    return {"kind": "run", "setting": setting, **measured}


def compare(preset: str, settings: list[str], rounds: int) -> dict[str, Any]:
    """Alternate two settings, swapping their order each round, so that other load affects both equally."""
    from scripts.bench.bench import Worker

    workers = [Worker(preset, setting) for setting in settings]
    taken: list[list[tuple[float, float, int]]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            taken[which].append(workers[which].step())
    for worker in workers:
        worker.close()
    columns = [list(zip(*steps, strict=True)) for steps in taken]
    ratios = {
        unit: [b / a for a, b in zip(columns[0][place], columns[1][place], strict=True)]
        for place, unit in enumerate(("seconds", "cpu_seconds"))
    }
    sides = [
        {"setting": setting, "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": max(peaks)}
        for setting, (seconds, cpu, peaks) in zip(settings, columns, strict=True)
    ]
    return {"kind": "compare", "sides": sides, "ratios": ratios}


def sweep(preset: str, setting: str, name: str, steps: int) -> dict[str, Any]:
    """Seconds and peak bytes per step at each value, with a linear fit."""
    from scripts.bench.bench import Worker

    unit, points = SWEEPS[name]
    rows = []
    for value, change in points:
        worker = Worker(preset, f"{setting};{change}")
        taken = [worker.step() for _ in range(steps)]
        worker.close()
        seconds, _, peaks = zip(*taken, strict=True)
        rows.append({"value": value, "seconds": statistics.median(seconds), "peak_bytes": max(peaks)})
        print(f"{name} {value:g}: {rows[-1]['seconds']:.2f} s", file=sys.stderr)
    lines = {key: page.fit_line(rows, key) for key in ("seconds", "peak_bytes")}
    return {
        "kind": "sweep",
        "setting": setting,
        "quantity": name,
        "unit": unit,
        "points": rows,
        "lines": lines,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.compare:
        return compare(args.preset, args.compare, args.steps)
    if args.sweep:
        return sweep(args.preset, args.setting, args.sweep, args.steps)
    return run(args.preset, args.setting, args.steps)


def origin(argv: list[str], script: str = "scripts/benchmark.py") -> dict[str, Any]:
    """Machine, versions and command to record in the result, without local paths."""
    from Core.utils.environment import describe

    found = describe()
    return {
        "command": shlex.join(["python", *script.split(), *argv]),
        **{key: found[key] for key in ("commit", "hardware", "versions")},
    }


def write_docs() -> int:
    try:
        page.write()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.write_docs:
        return write_docs()
    import torch

    from scripts.bench.bench import config_of

    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        for text in args.compare or [args.setting]:
            config_of(args.preset, Setting.parse(text), Path("unused"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        result = measure(args)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = {"preset": args.preset, "threads": torch.get_num_threads(), **result, **origin(argv)}
    page.deliver(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
