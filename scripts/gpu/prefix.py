"""The sampling steps without a gradient, as they are and as a CUDA graph or compiled: whether either pays.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from Core.sampling.euler import DenoisingStep, Predict, run_steps
from scripts.bench.bench import Bench
from scripts.gpu.part import Report
from scripts.gpu.steps import benched

ROUNDS = 3
WARM_UP = 3  # passes before a capture, as torch.cuda.graph asks for


def graph(report: Report, small: bool, size: str) -> None:
    """Seconds of the prefix, eager and replayed, and how far the two latents are apart."""
    with benched(size, small) as bench:
        bench.step()
        trainer, backbone = bench.trainer, bench.trainer.backbone
        predict, _ = trainer.objective.rollout.predictor(trainer.prompts_of([0]))
        with torch.no_grad(), trainer.distributed.autocast(), backbone.no_grad_steps():
            eager, seconds = timed(lambda: prefix(bench, predict), bench.device)
            report.add(eager_seconds=seconds)
            if bench.device.type != "cuda":
                report.add(missing="CUDA graphs need CUDA")
                return
            replay = captured(predict, *inputs(bench))
            replayed, seconds = timed(lambda: prefix(bench, replay), bench.device)
        difference = (replayed - eager).norm() / eager.norm()
        report.add(graph_seconds=seconds, relative_difference=float(difference))


def compiled(report: Report, small: bool, size: str) -> None:
    """Seconds of the prefix in whole training steps, before and after the blocks are compiled."""
    with benched(size, small) as bench:
        report.add(eager_seconds=prefix_seconds(bench))
        started = time.perf_counter()
        bench.trainer.backbone.compile_blocks()
        bench.step()
        report.add(first_step_seconds=time.perf_counter() - started)
        report.add(compiled_seconds=prefix_seconds(bench))


def prefix_seconds(bench: Bench) -> float:
    bench.step()
    return statistics.median(bench.step()["prefix"] for _ in range(ROUNDS))


def inputs(bench: Bench) -> tuple[Tensor, Tensor]:
    """Noise [1, C, T, h, w] of the first video, and timesteps [1]."""
    noise = bench.trainer.objective.rollout.noise([0])
    return noise, bench.trainer.backbone.timesteps(1)[0].clone()


def prefix(bench: Bench, predict: Predict) -> Tensor:
    """The latent [1, C, T, h, w] where the gradient window begins."""
    backbone = bench.trainer.backbone
    timesteps = backbone.timesteps(1)
    step = DenoisingStep(predict, backbone.process, timesteps)
    return run_steps(step, inputs(bench)[0], 0, len(timesteps) - 1)


def timed(run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """The last result, and median seconds after one run that warms up."""
    taken = []
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return result, statistics.median(taken[1:])


def captured(predict: Predict, z: Tensor, t: Tensor) -> Predict:
    """``predict`` as a graph that reads ``z`` and ``t``; the next call overwrites the tensor it answers in."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            predict(z, t)
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        out = predict(z, t)

    def replay(latent: Tensor, timesteps: Tensor, generated: Tensor | None = None) -> Tensor:
        z.copy_(latent)
        t.copy_(timesteps)
        recorded.replay()
        return out

    return replay
