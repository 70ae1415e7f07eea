"""A training objective in one file: ReFL's single jump from a random step to the finished video.

The steps before a step drawn at random keep no gradient; from there one prediction leads straight to the clean latent,
which is scored (Xu et al. 2023, ImageReward, arXiv:2304.05977). docs/adding-an-objective.md explains it. Run it:

    python examples/toy_objective.py CONFIG --objective one_jump [flags]

Axes: B batch, C channels, T latent frames, h, w latent rows and columns.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from Core.backbones import EncodedPrompt
from Core.cli import main
from Core.rewards import RewardOutput
from Core.sampling.euler import DenoisingStep, run_steps
from Core.training.objectives import OBJECTIVES, Objective, ObjectiveSettings
from Core.utils import rng
from Core.utils.options import option
from Core.utils.timing import Stopwatch


@dataclass(frozen=True, kw_only=True)
class OneJumpSettings(ObjectiveSettings):
    """Keys of the one-jump objective."""

    latest_jumps: int = option(4, "the jump begins at one of this many last sampling steps", minimum=1)
    frame: int = option(0, "latent frame to score", minimum=0)


class OneJump(Objective):
    """Score the clean latent that one prediction with a gradient leads to."""

    settings_class = OneJumpSettings
    settings: OneJumpSettings

    @classmethod
    def config_errors(
        cls, settings: OneJumpSettings, sampling_steps: int | None, latent_frames: int | None
    ) -> list[str]:
        limits = {"latest_jumps": sampling_steps, "frame": latent_frames and latent_frames - 1}
        return [
            f"{key} must be at most {limit} for this video, got {getattr(settings, key)}"
            for key, limit in limits.items()
            if limit is not None and getattr(settings, key) > limit
        ]

    def begin_step(self, step: int) -> None:
        generator = rng.generator(self.seed, "jump", step)
        self.jump = 1 + int(torch.randint(self.settings.latest_jumps, (), generator=generator))

    def loss(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> RewardOutput:
        backbone = self.backbone
        timesteps = backbone.timesteps(len(samples))
        start = len(timesteps) - self.jump
        predict = backbone.predictor([text.features_of() for text in prompts])
        generators = [rng.generator(self.seed, "noise", sample) for sample in samples]
        z = rng.noise(generators, backbone.latent_shape()).to(backbone.device)
        with torch.no_grad(), backbone.no_grad_steps():
            z = run_steps(DenoisingStep(predict, backbone.process, timesteps), z, 0, start)
        timer.lap("prefix")
        t = timesteps[start]
        clean = backbone.process.step(z, predict(z, t), t, torch.zeros_like(t))
        timer.lap("gradient_steps")
        index = torch.full((len(samples), 1), self.settings.frame)
        frames = backbone.decode_frames(clean, index)
        timer.lap("decode")
        self.frames = frames.detach()
        reward = self.reward(frames, [text.prompt.reward_text for text in prompts])
        timer.lap("reward")
        return reward


OBJECTIVES.register("one_jump", OneJump)

if __name__ == "__main__":
    sys.exit(main())
