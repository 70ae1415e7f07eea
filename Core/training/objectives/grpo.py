"""GRPO on the sampler (Flow-GRPO, arXiv:2505.05470; DanceGRPO, arXiv:2505.07818).

Videos are sampled by an SDE with the ODE's marginals, whose steps are Gaussian. Steps of videos that are better than
their group are made more probable, others less, each ratio of new to old probability being clipped.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from Core.backbones import EncodedPrompt
from Core.rewards import RewardOutput
from Core.sampling.euler import step_ends
from Core.sampling.sde import StochasticStep
from Core.training.rollout import GuidedSettings, KlSettings, base_model
from Core.utils import rng
from Core.utils.options import option
from Core.utils.timing import Stopwatch

from .group import GroupObjective, GroupSettings


@dataclass(frozen=True, kw_only=True)
class GRPOSettings(GroupSettings, GuidedSettings, KlSettings):
    """Keys of GRPO."""

    noise_level: float = option(
        0.7,
        "noise of the stochastic sampler: relative to √(s / (1 − s)) in flow models, η of DDIM, at most 1, in others",
        above=0,
    )
    grad_steps: int | None = option(
        None,
        "sampling steps that are trained, drawn anew for each training step among those that draw noise; None = all "
        "of these",
        minimum=1,
    )
    clip_range: float = option(
        1e-4, "clip the ratio of probabilities per latent element to 1 ± this", above=0, below=1
    )
    kl_weight: float = option(
        0.0, "weight of the KL divergence of each step from the base model's, per latent element", minimum=0
    )


class GRPO(GroupObjective):
    """Clipped policy gradient over the steps of a stochastic sampler."""

    settings_class = GRPOSettings
    settings: GRPOSettings
    grad_steps: tuple[int, ...] = ()

    @classmethod
    def config_errors(
        cls, settings: GRPOSettings, sampling_steps: int | None, latent_frames: int | None
    ) -> list[str]:
        errors = super().config_errors(settings, sampling_steps, latent_frames)
        if sampling_steps == 1:
            errors.append("objective='grpo' needs at least 2 sampling steps; a single one has no noise")
        elif sampling_steps and (settings.grad_steps or 0) > sampling_steps:
            errors.append(
                f"grad_steps must be at most the {sampling_steps} sampling steps, got {settings.grad_steps}"
            )
        return errors

    def begin_step(self, step: int) -> None:
        """The draws of the step.

        Raises:
            ValueError: fewer sampling steps draw noise than are to be trained.
        """
        super().begin_step(step)
        timesteps, process = self.backbone.timesteps(1), self.backbone.process
        std = process.step_std(timesteps, step_ends(process, timesteps), self.settings.noise_level).cpu()
        order = torch.randperm(len(std), generator=rng.generator(self.seed, "grpo", step))
        # A step that draws no noise has no probabilities, such as DDIM's from the lowest level.
        order = order[std[order, 0] > 0]
        wanted = self.settings.grad_steps or 1
        if len(order) < wanted:
            raise ValueError(
                f"objective='grpo' is to train {wanted} of the sampling steps that draw noise, and {len(order)} of "
                f"{len(std)} do; set more sampling steps, or a smaller grad_steps"
            )
        self.grad_steps = tuple(sorted(order[: self.settings.grad_steps].tolist()))
        # By first sample number and sampling step: the latents around it, and its log-probability when first trained.
        self.transitions: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.old_log_probs: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def sample(self, prompts: Sequence[EncodedPrompt], samples: Sequence[int]) -> Tensor:
        step, z = self.stochastic_step(prompts, samples), self.rollout.noise(samples)
        with self.backbone.no_grad_steps():
            for i in range(len(step.timesteps)):
                before, z = z, step(z, i)
                if i in self.grad_steps:
                    self.transitions[samples[0], i] = self.keep(before), self.keep(z)
        return z

    def stochastic_step(self, prompts: Sequence[EncodedPrompt], samples: Sequence[int]) -> StochasticStep:
        """The sampler with the adapter as it is now, for one pass."""
        return StochasticStep(
            self.backbone.predictor(
                self.rollout.features(prompts), null_grad=self.settings.guidance_grad == "both"
            ),
            self.backbone.process,
            self.backbone.timesteps(len(samples)),
            self.settings.noise_level,
            lambda i: self.rollout.normal("sde", samples, i),
        )

    def losses(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> Iterator[RewardOutput]:
        for i in self.grad_steps:
            yield self.step_loss(prompts, samples, i)
            timer.lap("gradient_steps")

    def step_loss(self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], i: int) -> RewardOutput:
        """The term of sampling step ``i``."""
        before, after = (self.latents(z, samples) for z in self.transitions[samples[0], i])
        policy = self.stochastic_step(prompts, samples).distribution(before, i)
        log_prob = policy.log_prob(after)
        # Before a step's first update the policy is the one that sampled. Taken here rather than while sampling,
        # which runs other kernels, the ratio starts at 1 exactly.
        old = self.old_log_probs.setdefault((samples[0], i), log_prob.detach())
        ratio, advantages = (log_prob - old).exp(), self.advantages(samples).to(log_prob)
        clip = self.settings.clip_range
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
        parts = {"ratio": ratio, "clipped": ((ratio - 1).abs() > clip).to(ratio)}
        if self.settings.kl_weight:
            with base_model(self.backbone.denoiser):
                base = self.stochastic_step(prompts, samples).distribution(before, i)
            parts["kl"] = policy.kl(base)
            loss = loss + self.settings.kl_weight * parts["kl"]
        return self.output(loss, samples, **parts)

    def end_step(self) -> None:
        super().end_step()
        self.transitions.clear()
        self.old_log_probs.clear()
