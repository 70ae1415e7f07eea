"""Training steps with random weights at full size: time by phase and peak memory."""

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from scripts.bench.bench import Bench
from scripts.bench.meter import PeakMemory
from scripts.bench.presets import Setting
from scripts.benchmark import compare
from scripts.gpu.part import Report
from scripts.gpu.parts import PRESETS

# A step of under a second on a CPU.
TINY = (
    ";image_size=(32,32);scheduler.num_sampling_steps=2;model.hidden_size=192;model.num_heads=3"
    ";model.caption_channels=256;text_encoder.d_model=256"
)
ROUNDS = 3
ENOUGH = 15.0  # seconds of measured steps, after which no further one begins
NEEDS = {"base_quant=nf4": "bitsandbytes"}


def chosen(size: str, small: bool, setting: str = "default") -> tuple[str, str]:
    """Preset and setting of a size, or of its small stand-in."""
    if not small:
        return PRESETS[size], setting
    return ("wan-twin", setting) if size.startswith("wan") else ("cpu-twin", setting + TINY)


@contextmanager
def benched(size: str, small: bool, setting: str = "default") -> Iterator[Bench]:
    preset, text = chosen(size, small, setting)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(preset, Setting.parse(text), Path(folder))
        with bench.path():
            yield bench


def phases(report: Report, small: bool, size: str) -> None:
    """What ``cost`` measures, then peak, operations and bytes by phase, and the ceiling."""
    with benched(size, small) as bench:
        report_cost(report, bench)
        report.add(**bench.measure(ROUNDS))


def against_plain(report: Report, small: bool, size: str) -> None:
    (preset, default), (_, plain) = (chosen(size, small, setting) for setting in ("default", "plain"))
    report.add(**compare(preset, [default, plain], rounds=1 if small else ROUNDS))


def cost(report: Report, small: bool, size: str, setting: str = "default") -> None:
    """Seconds by phase and peak memory of a step."""
    with benched(size, small, setting) as bench:
        report_cost(report, bench)


def stored(report: Report, small: bool, change: str) -> None:
    """``cost`` at 240p with one key changed."""
    package = NEEDS.get(change)
    if package and find_spec(package) is None:
        report.add(missing=f"{package} is not installed")
        return
    cost(report, small, "240p", f"default;{change}")


def report_cost(report: Report, bench: Bench) -> None:
    """Medians over steps after two that warm up; the second finds its memory already reserved.

    Reported after every step, and over fewer steps where they are long, so that a slow card tells something too.
    """
    bench.step()
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    memory = PeakMemory(bench.device)
    bench.step()
    backbone, taken = bench.trainer.backbone, []
    peak = reserved = 0
    report.add(latent=list(backbone.latent_shape()), sampling_steps=len(backbone.timesteps(1)))
    while len(taken) < ROUNDS and sum(map(sum_of, taken)) < ENOUGH:
        taken.append(bench.step())
        if on_gpu:  # before the peaks begin anew
            reserved = max(reserved, torch.cuda.max_memory_reserved())
        peak = max(peak, memory.take())
        report.add(
            step_seconds=[sum_of(step) for step in taken],
            phase_seconds={name: statistics.median(step[name] for step in taken) for name in taken[0]},
            peak_bytes=peak,
            reserved_bytes=reserved or None,
        )


def sum_of(step: dict[str, float]) -> float:
    return sum(step.values())
