"""What objectives without the reward's gradient share: groups of videos per prompt, compared by their rewards.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, n videos of a step over all processes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from Core.backbones import Backbone, EncodedPrompt, VideoSpec
from Core.rewards import Reward, RewardOutput
from Core.sampling.euler import per_video
from Core.sampling.frame_choice import check_decode_frame, count_frames
from Core.training.rollout import Rollout, RolloutSettings
from Core.utils import rng
from Core.utils.options import option
from Core.utils.timing import Stopwatch

from .base import Batch, Gather, Objective

logger = logging.getLogger("vader")
MAX_ADVANTAGE = 5.0
STD_FLOOR = 1e-4
WHOLE_VIDEO = "video"


@dataclass(frozen=True, kw_only=True)
class GroupSettings(RolloutSettings):
    """Keys that all objectives without the reward's gradient have."""

    group_size: int = option(
        4, "videos of each prompt, compared with each other; divides the global batch", minimum=2
    )
    inner_epochs: int = option(1, "optimiser steps on the videos of a training step", minimum=1)
    trajectory_device: Literal["device", "cpu"] = option(
        "device", "where sampled latents wait for their optimiser steps; `cpu` saves the GPU's memory"
    )
    decode_frame: str | int | list[int] = option(
        WHOLE_VIDEO,
        "what is scored: the finished `video`, as in validation, or what the other objectives' decode_frame says",
    )

    @property
    def videos_per_prompt(self) -> int:
        return self.group_size


@dataclass(frozen=True)
class Comparison:
    """What the rewards of a step say of its n videos, in the order of their numbers.

    Attributes:
        first: number of the first video.
        rewards: [n], larger is better.
        advantages: [n] relative to the video's group; 0 in a group that is left out.
        sound: [n] bool, whether all rewards of the video's group are finite.
        logged: [n, columns]; in a group that is left out the mean of the others, which it does not disturb so.
        group_size: videos of a group.
    """

    first: int
    rewards: Tensor
    advantages: Tensor
    sound: Tensor
    logged: Tensor
    group_size: int

    @classmethod
    def of(cls, numbers: Tensor, values: Tensor, group_size: int) -> "Comparison":
        """From [n] numbers in any order and [n, 1 + columns], the reward and what is logged of each."""
        order = numbers.argsort()
        rewards, logged = values[order, 0], values[order, 1:]
        advantages, sound = group_advantages(rewards, group_size)
        logged = torch.where(sound[:, None], logged, logged[sound].mean(0))
        return cls(int(numbers.min()), rewards, advantages, sound, logged, group_size)

    def rows(self, samples: Sequence[int]) -> slice:
        return slice(samples[0] - self.first, samples[-1] + 1 - self.first)

    @property
    def skipped_groups(self) -> int:
        return int((~self.sound).sum()) // self.group_size

    @property
    def spread(self) -> Tensor:
        """[n]: standard deviation of the rewards of each video's group; 0 in one that is left out."""
        rewards = self.rewards.where(self.sound, 0).view(-1, self.group_size)
        return rewards.std(1, correction=0).repeat_interleave(self.group_size)


def group_advantages(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(R − mean) / (standard deviation + 1e-4) within each group, clipped to ±5; and whether it is finite.

    Args:
        rewards: [n], group after group.

    Returns:
        advantages [n], 0 in a group with a reward that is not finite; sound [n] bool, False in such a group.
    """
    groups = rewards.view(-1, group_size)
    sound = groups.isfinite().all(1, keepdim=True)
    groups = groups.where(sound, 0)
    deviation = groups.std(1, correction=0, keepdim=True)
    advantages = (groups - groups.mean(1, keepdim=True)) / (deviation + STD_FLOOR)
    clipped = advantages.clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)
    return clipped.flatten(), sound.expand_as(groups).flatten()


class GroupObjective(Objective):
    """An objective that compares the rewards of several videos of a prompt, and needs no gradient of them.

    The reward is minus the loss that training by gradient would minimise, so that targets, hinges and rewards that are
    better when lower mean the same to every objective.

    Attributes:
        videos: first sample number of each of this process's batches → its clean latents, where they are kept.
        comparison: of the current step, over all processes.
    """

    needs_reward_gradient = False
    settings: Any
    comparison: Comparison
    part_names: tuple[str, ...]

    def __init__(self, settings: GroupSettings, backbone: Backbone, reward: Reward, seed: int):
        super().__init__(settings, backbone, reward, seed)
        self.rollout = Rollout(settings, backbone, seed)
        self.group_size, self.updates_per_step = settings.group_size, settings.inner_epochs
        self.step = self.update = 0
        self.videos: dict[int, Tensor] = {}

    @classmethod
    def config_errors(cls, settings: Any, sampling_steps: int | None, latent_frames: int | None) -> list[str]:
        if settings.decode_frame == WHOLE_VIDEO or not latent_frames:
            return []
        try:
            check_decode_frame(settings.decode_frame, latent_frames)
        except ValueError as error:
            return [f"{error}; or {WHOLE_VIDEO!r} for all of the finished video"]
        return []

    @classmethod
    def count_scored_frames(cls, settings: Any, latent_frames: int, video: VideoSpec) -> int:
        if settings.decode_frame == WHOLE_VIDEO:
            return video.num_frames
        return count_frames(settings.decode_frame, latent_frames, video.num_frames, video.fps)

    @classmethod
    def batch_errors(cls, settings: Any, global_batch: int) -> list[str]:
        size = settings.group_size
        if global_batch % size == 0:
            return []
        fitting = [str(n) for n in range(2, global_batch + 1) if global_batch % n == 0]
        advice = f"set group_size to {' or '.join(fitting)}, or " if fitting else ""
        return [
            f"group_size={size} does not divide the global batch of {global_batch} (train_batch_size × "
            f"gradient_accumulation_steps × processes): {advice}change the batch to a multiple of it"
        ]

    def begin_step(self, step: int) -> None:
        self.step = step

    def begin_update(self, number: int) -> None:
        self.update = number

    def collect(self, batches: Sequence[Batch], gather: Gather, timer: Stopwatch) -> None:
        values = []
        for prompts, samples in batches:
            rng.seed_globals(self.seed, "collect", samples[0])
            z = self.sample(prompts, samples)
            timer.lap("sampling")
            self.videos[samples[0]] = self.keep(z)
            values.append(self.evaluate(z, prompts, samples, timer))
        numbers = torch.tensor([sample for _, samples in batches for sample in samples])
        self.comparison = Comparison.of(gather(numbers), gather(torch.cat(values)), self.group_size)
        self.report_skipped(batches)

    def sample(self, prompts: Sequence[EncodedPrompt], samples: Sequence[int]) -> Tensor:
        """Clean latents [B, C, T, h, w], without a graph."""
        raise NotImplementedError

    def keep(self, z: Tensor) -> Tensor:
        """Latents where they wait for the step's updates."""
        return z.cpu() if self.settings.trajectory_device == "cpu" else z

    @torch.no_grad()
    def evaluate(
        self, z: Tensor, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> Tensor:
        """[B, 2 + parts]: reward, score and parts of clean latents."""
        self.frames = self.scored_frames(z, samples)
        timer.lap("decode")
        output = self.reward(self.frames, [encoded.prompt.reward_text for encoded in prompts])
        timer.lap("reward")
        self.part_names = tuple(output.parts)
        return torch.stack([-output.loss, output.score, *output.parts.values()], dim=1)

    def scored_frames(self, z: Tensor, samples: Sequence[int]) -> Tensor:
        """[B, F, 3, H, W]: of the finished video what the reward samples, or the frames of ``decode_frame``."""
        if self.settings.decode_frame != WHOLE_VIDEO:
            return self.rollout.frames(z, samples)
        video = self.backbone.decode(z)
        index = self.reward.sample_frames(video.shape[2], self.backbone.video.fps)
        return video[:, :, index].transpose(1, 2)

    def report_skipped(self, batches: Sequence[Batch]) -> None:
        """Name the prompts of this process whose group is left out."""
        for prompts, samples in batches:
            rewards = self.comparison.rewards[self.comparison.rows(samples)]
            for encoded, number, finite in zip(prompts, samples, rewards.isfinite().tolist(), strict=True):
                if not finite:
                    logger.warning(
                        "step %d leaves out the group of %r: the reward of its video %d is not finite",
                        self.step + 1, encoded.prompt.reward_text, number,
                    )  # fmt: skip

    def latents(self, kept: Tensor, samples: Sequence[int]) -> Tensor:
        """Kept latents on the device; those of groups that are left out are zero, since they may not be finite."""
        sound = per_video(self.comparison.sound[self.comparison.rows(samples)])
        return kept.where(sound.to(kept.device), 0).to(self.backbone.device)

    def advantages(self, samples: Sequence[int]) -> Tensor:
        """[B], on the device."""
        return self.comparison.advantages[self.comparison.rows(samples)].to(self.backbone.device)

    def output(self, loss: Tensor, samples: Sequence[int], **parts: Tensor) -> RewardOutput:
        """A term of the loss, without the videos that are left out, beside what the step logs of its videos."""
        compared, rows = self.comparison, self.comparison.rows(samples)
        score, *logged = compared.logged[rows].to(loss).unbind(1)
        named = dict(zip(self.part_names, logged, strict=True))
        named |= {name: part.detach() for name, part in parts.items()}
        named["reward_spread"] = compared.spread[rows].to(loss)
        named["skipped_groups"] = torch.full_like(loss, compared.skipped_groups, requires_grad=False)
        return RewardOutput(score, loss * compared.sound[rows].to(loss), named)

    def end_step(self) -> None:
        self.videos.clear()
