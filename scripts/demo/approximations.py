"""Measure the speed and error of options that change a training step, on the demo's models.

``python -m scripts.demo.approximations [--batches 4] [--json docs/benchmarks/demo-approximations.json]``

Each option runs the same training step as the exact settings, with a new adapter. Measured are the seconds per step,
the relative error of the final latents, the relative error of the velocity along the exact trajectory, and the cosine
between the option's LoRA gradient and the exact one.
"""

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from Core.config import load_config
from Core.modules import lora
from Core.training.setup import build_trainer
from Core.training.trainer import Trainer
from Core.utils.distributed import Distributed
from Core.utils.timing import Stopwatch
from scripts.bench import page
from scripts.benchmark import origin
from scripts.demo.common import DEMO

OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "prefix_steps=6": {"prefix_steps": 6},
    "prefix_steps=3": {"prefix_steps": 3},
    "dtype='fp8'": {"dtype": "fp8", "mixed_precision": "bf16"},
    "base_quant='nf4'": {"base_quant": "nf4"},
    "dtype='bf16'": {"dtype": "bf16", "mixed_precision": "bf16"},
    "decode_context='causal'": {"decode_context": "causal"},
    "guidance_grad='cond'": {"guidance_grad": "cond"},
}


@dataclass
class Outcome:
    """Per batch: final latents, LoRA gradient as a vector, seconds."""

    latents: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def trainer_of(option: str, folder: Path) -> Trainer:
    values = {"verbose": 0, "project_dir": str(folder), **OPTIONS[option]}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
    config = load_config([str(DEMO), *flags])
    return build_trainer(config, Distributed(config.optimizer.mixed_precision), folder)


def batch_of(trainer: Trainer, number: int) -> range:
    size = trainer.config.optimizer.train_batch_size
    return range(number * size, (number + 1) * size)


def step(trainer: Trainer, number: int) -> tuple[Tensor, Tensor, float]:
    """Latents, gradient and seconds of batch ``number``."""
    lora.set_dropout(trainer.backbone.denoiser, True, trainer.seed, number)
    rollout, made = trainer.objective.rollout, []
    sample = rollout.sample

    def watched(*args, **kwargs):
        made.append(sample(*args, **kwargs))
        return made[-1]

    timer = Stopwatch(trainer.distributed.device)
    trainer.objective.begin_step(0)
    with mock.patch.object(rollout, "sample", watched):
        trainer.micro_step(batch_of(trainer, number), timer)
    seconds = sum(timer.seconds().values())
    gradient = torch.cat([p.grad.flatten() for p in trainer.parameters])
    for parameter in trainer.parameters:
        parameter.grad = None
    return made[0][0].detach(), gradient, seconds


@torch.no_grad()
def velocities(trainer: Trainer, latents: Tensor) -> Tensor:
    """Velocities of the first batch at every timestep on the straight line from its noise to ``latents``."""
    samples = batch_of(trainer, 0)
    backbone, rollout = trainer.backbone, trainer.objective.rollout
    predict = backbone.predictor(rollout.features(trainer.prompts_of(samples)))
    noise, found = rollout.noise(samples), []
    with trainer.distributed.autocast():
        for t in backbone.timesteps(len(samples)):
            found.append(predict(backbone.process.add_noise(latents, noise, t), t))
    return torch.stack(found)


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def row(option: str, found: Outcome, exact: Outcome, velocity_error: float) -> dict[str, Any]:
    pairs = list(zip(found.gradients, exact.gradients, strict=True))
    ratios = [b / a for a, b in zip(found.seconds, exact.seconds, strict=True)]
    return {
        "option": option,
        "seconds": statistics.median(found.seconds),
        "times_as_fast": [statistics.median(ratios), min(ratios), max(ratios)],
        "latent_distance": statistics.mean(map(distance, found.latents, exact.latents)),
        "velocity_error": velocity_error,
        "gradient_cosine": statistics.mean(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs),
    }


def measure(batches: int) -> list[dict[str, Any]]:
    """One row per option; options alternate batch by batch, so that other load affects all equally."""
    with ExitStack() as stack:
        trainers = {}
        for option in OPTIONS:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            trainers[option] = trainer_of(option, folder)
            stack.callback(trainers[option].trackers.close)
        found = {option: Outcome() for option in OPTIONS}
        for number in range(-1, batches):
            for option, trainer in trainers.items():
                latents, gradient, seconds = step(trainer, max(number, 0))
                if number >= 0:  # the first round is a warm-up
                    found[option].latents.append(latents)
                    found[option].gradients.append(gradient)
                    found[option].seconds.append(seconds)
        exact = found["exact"]
        ways = {option: velocities(trainer, exact.latents[0]) for option, trainer in trainers.items()}
    return [row(o, found[o], exact, distance(ways[o], ways["exact"])) for o in OPTIONS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the result there")
    args = parser.parse_args()
    result = {
        "preset": "demo",
        "threads": torch.get_num_threads(),
        "kind": "options",
        "rows": measure(args.batches),
        **origin(sys.argv[1:], "-m scripts.demo.approximations"),
    }
    page.deliver(result, args.json)


if __name__ == "__main__":
    main()
