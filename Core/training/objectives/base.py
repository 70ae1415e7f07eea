"""What an objective is: everything between a batch of prompts and a loss.

Axes: B batch, F frames, H, W pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from Core.backbones import Backbone, EncodedPrompt, Prompt, VideoSpec
from Core.rewards import Reward, RewardOutput
from Core.utils.timing import Stopwatch

# Objectives of the registry whose ``needs_reward_gradient`` is False.
GRADIENT_FREE = ("nft", "dpo", "grpo", "dpo_pairs")
# Prompts and global sample numbers of one backward pass.
Batch = tuple[Sequence[EncodedPrompt], Sequence[int]]
# Rows of every process, one after the other, on the CPU.
Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """Keys of one objective; an objective subclasses it with its own options."""

    @property
    def videos_per_prompt(self) -> int:
        return 1


class Objective:
    """How a batch of prompts becomes a loss.

    A training step of the trainer is: ``begin_step``; ``collect`` with all of this process's batches; then
    ``updates_per_step`` times ``begin_update``, the ``losses`` of each batch and an optimiser step; ``end_step``.
    Most objectives implement ``loss`` alone. Every draw follows from ``seed`` and the step or the videos' global
    numbers, so that a step is the same however it is split over processes and backward passes.

    Args:
        settings: an instance of ``settings_class``.
        seed: of the run.

    Class attributes:
        settings_class: its keys of the configuration.
        needs_reward_gradient: whether the reward must be differentiable.

    Attributes:
        group_size: videos of each prompt, with consecutive numbers.
        updates_per_step: optimiser steps on the videos of one training step.
        frames: what the step scored last, [B, F, 3, H, W] in [-1, 1], detached.
    """

    settings_class: ClassVar[type[ObjectiveSettings]]
    needs_reward_gradient: ClassVar[bool] = True
    group_size: int = 1
    updates_per_step: int = 1
    frames: Tensor | None = None

    def __init__(self, settings: Any, backbone: Backbone, reward: Reward, seed: int):
        self.settings, self.backbone, self.reward, self.seed = settings, backbone, reward, seed

    @classmethod
    def config_errors(cls, settings: Any, sampling_steps: int | None, latent_frames: int | None) -> list[str]:
        """What is wrong with its keys beyond types and ranges.

        Args:
            sampling_steps, latent_frames: of a video; None where the configuration does not say it, which is reported
                elsewhere.
        """
        return []

    @classmethod
    def batch_errors(cls, settings: Any, global_batch: int) -> list[str]:
        """What is wrong with its keys for so many videos of a step, over all processes."""
        return []

    @classmethod
    def prompt_errors(cls, settings: Any, prompts: Sequence[Prompt]) -> list[str]:
        """Which of the training prompts it cannot learn from; its keys are sound by then."""
        return []

    @classmethod
    def contents(cls, settings: Any) -> Mapping[str, str]:
        """Hashes of files that its sound keys name and that must not change while a run continues."""
        return {}

    def begin_step(self, step: int) -> None:
        """Make the draws that hold for a whole training step, the same on every process."""

    def collect(self, batches: Sequence[Batch], gather: Gather, timer: Stopwatch) -> None:
        """Sample and score what the step's updates learn from, where they share it; called on every process."""

    def begin_update(self, number: int) -> None:
        """Prepare for the update with this number within the step."""

    def losses(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> Iterator[RewardOutput]:
        """Terms whose losses add up; each is sent backward, and its graph freed, before the next is asked for."""
        yield self.loss(prompts, samples, timer)

    @classmethod
    def count_scored_frames(cls, settings: Any, latent_frames: int, video: VideoSpec) -> int:
        """F, the frames of each video that the reward gets; by default as many as latent frames."""
        return latent_frames

    def loss(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> RewardOutput:
        """Score, loss with a graph to the adapter, and what to log, each [B].

        Args:
            samples: global numbers of the videos, one per prompt.
            timer: ends a lap after each phase.
        """
        raise NotImplementedError

    def end_step(self) -> None:
        """Follow the adapter, which the step's updates have changed."""

    def state(self) -> Mapping[str, Any]:
        """What continuing a run needs of it beside the adapter, readable by ``torch.load(weights_only=True)``."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state`` returned."""

    def tensors(self) -> list[Tensor]:
        """What must be equal on all processes beside the adapter."""
        return []


def refuse_missing_gradient(reward: RewardOutput, frames: Tensor) -> None:
    """Raise ValueError, naming the objectives that need none, where a loss of frames with a graph has no gradient."""
    if frames.requires_grad and not reward.loss.requires_grad:
        raise ValueError(no_gradient_sentence("the reward"))


def no_gradient_sentence(reward: str) -> str:
    """Why a reward cannot be trained on by its gradient, and what can be done."""
    *free, last = map(repr, GRADIENT_FREE)
    return (
        f"{reward} has no gradient with respect to the frames; set objective to {', '.join(free)} or "
        f"{last}, which need none, or compute it with differentiable operations and without torch.no_grad"
    )
