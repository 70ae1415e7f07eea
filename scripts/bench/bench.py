"""Build a preset under a setting once, then step it, in this process or in a subprocess."""

import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from Core.backbones import EncodedPrompt
from Core.build import new_backbone
from Core.config import Config, build_config
from Core.training.metric_logging import Trackers
from Core.training.setup import adapt_for_training
from Core.training.trainer import Trainer
from Core.training.validation import Validation
from Core.utils.distributed import Distributed
from scripts.bench.meter import (
    MeteredStopwatch,
    OperationCounter,
    PeakMemory,
    copy_bandwidth,
    matmul_ceiling,
)
from scripts.bench.networks import RandomHPS, registered
from scripts.bench.plain import plain_path
from scripts.bench.presets import PRESETS, Setting


def config_of(preset: str, setting: Setting, folder: Path) -> Config:
    """The config of ``preset`` under ``setting``.

    Raises:
        ValueError: invalid keys or values; the message lists them all.
    """
    if setting.plain and PRESETS[preset].values["backbone"] != "benchmark":
        raise ValueError(f"plain is for the presets of Open-Sora, got {preset!r}; use default")
    with registered():
        return build_config({**setting.values(PRESETS[preset]), "project_dir": str(folder)})


class Bench:
    """A trainer with random weights whose steps are measured by phase."""

    def __init__(self, preset: str, setting: Setting, folder: Path):
        self.config = config = config_of(preset, setting, folder)
        self.setting, distributed = setting, Distributed(config.optimizer.mixed_precision)
        self.device = distributed.device
        with registered():
            backbone = new_backbone(config, distributed.device)
        self.encoder = backbone.text_encoder()
        prompts = [
            EncodedPrompt(prompt, tuple(self.encoder.encode([backbone.caption(prompt.text)])))
            for prompt in config.prompt_list
        ]
        if backbone.negative_caption is not None:
            backbone.negative = self.encoder.encode([backbone.negative_caption])[0]
        if not setting.plain:
            self.encoder = None
            gc.collect()
            torch.cuda.empty_cache()
        backbone.load()
        with distributed.device:
            reward = (
                RandomHPS(PRESETS[preset].vit, PRESETS[preset].vit_text)
                .to(distributed.device)
                .cast(backbone.dtype)
            )
        adapt_for_training(config, backbone)
        validation = Validation(config, distributed, backbone, reward, {}, prompts)
        self.trainer = Trainer(
            config, {}, distributed, backbone, reward, prompts, validation, folder, Trackers({})
        )
        self.timer: MeteredStopwatch | None = None

    @contextmanager
    def path(self) -> Iterator[None]:
        """The setting's way to take steps, default or plain."""
        lap = lambda name: self.timer.lap(name) if self.timer else None  # noqa: E731
        with plain_path(self.trainer, self.encoder, lap) if self.setting.plain else nullcontext():
            yield

    def step(self, *listeners) -> dict[str, float]:
        """Take an optimiser step; return seconds by phase."""

        def start(device: torch.device) -> MeteredStopwatch:
            self.timer = MeteredStopwatch(device, list(listeners))
            return self.timer

        self.trainer.stopwatch = start
        metrics = self.trainer.train_step()
        self.trainer.step += 1
        return metrics.timings

    def measure(self, steps: int) -> dict[str, Any]:
        """Median seconds (over ``steps`` steps after a warm-up), peak bytes, operations and bytes by phase."""
        self.step()
        memory = PeakMemory(self.device)
        peaks: dict[str, int] = {}

        def note_peak(name: str) -> None:
            peaks[name] = max(peaks.get(name, 0), memory.take())

        taken, cpu_seconds = [], []
        for _ in range(steps):
            started = time.process_time()
            taken.append(self.step(note_peak))
            cpu_seconds.append(time.process_time() - started)
        ceiling = matmul_ceiling(self.device, self.trainer.backbone.dtype)
        bandwidth = copy_bandwidth(self.device)
        counter = OperationCounter(ceiling, bandwidth)
        with counter:
            self.step(counter.lap)
        phases = {
            name: {
                "seconds": statistics.median(step[name] for step in taken),
                "peak_bytes": peaks[name],
                **counter.phases[name],
            }
            for name in taken[0]
        }
        return {
            "steps": steps,
            "phases": phases,
            "step_seconds": [sum(step.values()) for step in taken],
            "cpu_seconds": cpu_seconds,
            "dtype": str(self.trainer.backbone.dtype).removeprefix("torch."),
            "ceiling": ceiling,
            "bandwidth": bandwidth,
        }


def _serve(pipe, preset: str, text: str, threads: int) -> None:
    """Worker body: build a bench, then answer requests (``"step"`` or ``"measure"``) until None."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(preset, Setting.parse(text), Path(folder))
        with bench.path():
            bench.step()
            pipe.send("ready")
            while (request := pipe.recv()) is not None:
                if request == "measure":
                    pipe.send(bench.measure(pipe.recv()))
                else:
                    memory = PeakMemory(bench.device)
                    started = time.process_time()
                    seconds = sum(bench.step().values())
                    pipe.send((seconds, time.process_time() - started, memory.take()))


class Worker:
    """A bench in its own process, so that its memory is measured separately.

    Raises:
        RuntimeError: the process stopped; its output says why.
    """

    def __init__(self, preset: str, text: str):
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        arguments = (child, preset, text, torch.get_num_threads())
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        child.close()
        self.name = f"{preset} under {text!r}"
        self._receive()

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"the worker of {self.name} stopped; see its message above") from None

    def step(self) -> tuple[float, float, int]:
        """(wall seconds, CPU seconds, peak bytes) of one step."""
        self.pipe.send("step")
        return self._receive()

    def measure(self, steps: int) -> dict[str, Any]:
        self.pipe.send("measure")
        self.pipe.send(steps)
        return self._receive()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()
