"""Measure a training step's overhead outside the model: measure_overhead.py RUN [--processes 2] [--json FILE].

RUN is a finished run folder; its metrics.csv gives the time of a step. The overhead is timed on the rank-16 adapter of
STDiT3-XL/2: random draws, NaN checks, the all-reduce between local processes, a row of metrics, and hashing a
checkpoint, spread over the steps between checkpoints.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

import torch  # noqa: E402
from torch import nn  # noqa: E402

from Core.config.files import read_run  # noqa: E402
from Core.modules import lora  # noqa: E402
from Core.training.metric_logging import CsvTracker  # noqa: E402
from Core.training.nan_check import find_fault  # noqa: E402
from Core.utils import rng  # noqa: E402
from Core.utils.distributed import Distributed  # noqa: E402
from Core.utils.tables import read_table  # noqa: E402

REPEATS = 9
BAR = 0.02


def adapter_of_xl() -> nn.Module:
    """STDiT3-XL/2 on the meta device, with its rank-16 adapter in memory."""
    from Core.backbones.opensora import OpenSora
    from opensora.registry import MODELS, build_module

    with torch.device("meta"):
        model = build_module({"type": "STDiT3-XL/2", "qk_norm": True}, MODELS)
        model = lora.attach(model, OpenSora.lora_targets, rank=16, alpha=8)
    for layer in model.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(layer, name, nn.Parameter(torch.randn(parameter.shape) / 100))
    return model


def median_seconds(action: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
    times = []
    for _ in range(REPEATS):
        prepare()
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(samples: int, latent: tuple[int, ...], checkpointing_steps: int) -> dict[str, float]:
    """Seconds per step of each kind of work; every process of the launch takes part."""
    distributed = Distributed()
    named = lora.parameters(adapter_of_xl())
    parameters = list(named.values())
    gradients = [torch.randn_like(parameter) for parameter in parameters]

    def arrive() -> None:
        """Set gradients as a backward pass would."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        distributed.barrier()

    arrive()
    numbers = range(samples)
    values = torch.ones(samples, 3)
    scalars = {f"train/value_{n}": 0.123456789 for n in range(16)}
    with tempfile.TemporaryDirectory() as folder:
        tracker = CsvTracker(Path(folder))
        step = iter(range(10**6))
        seconds = {
            "draws": median_seconds(
                lambda: rng.noise([rng.generator(0, "noise", n) for n in numbers], latent)
            ),
            "guards": median_seconds(lambda: find_fault([(n, "") for n in numbers], values, named)),
            "all-reduce": median_seconds(
                lambda: distributed.average_gradients(parameters, [False, False]), arrive
            ),
            "metrics": median_seconds(lambda: tracker.log(scalars, next(step))),
            "hashing / checkpoint": median_seconds(lambda: lora.digest(parameters)) / checkpointing_steps,
        }
    seconds["adapter weights"] = float(sum(p.numel() for p in parameters))
    return seconds if distributed.is_main else {}


def launch(processes: int, arguments: list[str]) -> dict[str, float]:
    """Run ``measure`` in this many local processes."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes), __file__, *arguments, "--worker", answer.name]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.load(answer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder to compare the overhead with")
    parser.add_argument("--processes", type=int, default=2, help="processes in the all-reduce (default 2)")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = read_run(args.run)
    samples = config["train_batch_size"] * config["gradient_accumulation_steps"]
    if args.worker:
        measured = measure(samples, (4, 15, 30, 40), config["checkpointing_steps"])
        if measured:
            args.worker.write_text(json.dumps(measured), encoding="utf-8")
        return 0
    step = statistics.median(row["seconds"] for row in read_table(args.run / "metrics.csv"))
    measured = launch(args.processes, [str(args.run)])
    report(step, measured, args.processes)
    if args.json:
        args.json.write_text(json.dumps({"step": step, **measured}, indent=1), encoding="utf-8")
    return 0


def report(step: float, measured: dict[str, float], processes: int) -> None:
    weights = measured.pop("adapter weights")
    print(f"adapter of {weights / 1e6:.1f} M weights, {processes} processes, step of {step:.2f} s")
    for name, seconds in measured.items():
        print(f"{name:>22} {1000 * seconds:9.2f} ms {seconds / step:8.3%}")
    total = sum(measured.values())
    verdict = "within" if total <= BAR * step else "above"
    print(f"{'all':>22} {1000 * total:9.2f} ms {total / step:8.3%}   {verdict} the bar of {BAR:.0%}")


if __name__ == "__main__":
    sys.exit(main())
