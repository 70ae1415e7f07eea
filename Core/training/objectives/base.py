"""What an objective is: everything between a batch of prompts and a loss.

Axes: B batch, F frames, H, W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from Core.backbones import Backbone, EncodedPrompt
from Core.rewards import Reward, RewardOutput
from Core.utils.timing import Stopwatch


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """Keys of one objective; an objective subclasses it with its own options."""


class Objective(ABC):
    """How a batch of prompts becomes a loss.

    The trainer calls ``begin_step`` once per optimiser step, then ``loss`` for each backward pass. Every draw follows
    from ``seed`` and the step or the videos' global numbers, so that a step is the same however it is split over
    processes and backward passes.

    Args:
        settings: an instance of ``settings_class``.
        seed: of the run.

    Class attributes:
        settings_class: its keys of the configuration.
        needs_reward_gradient: whether the loss follows the reward's gradient to the frames.

    Attributes:
        frames: what the last ``loss`` scored, [B, F, 3, H, W] in [-1, 1], detached.
    """

    settings_class: ClassVar[type[ObjectiveSettings]]
    needs_reward_gradient: ClassVar[bool] = True
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

    def begin_step(self, step: int) -> None:  # noqa: B027 (most objectives have none)
        """Make the draws that hold for a whole optimiser step, the same on every process."""

    @classmethod
    def scored_frames(cls, settings: Any, latent_frames: int) -> int:
        """F, the frames of each video that ``loss`` gives to the reward; by default as many as latent frames."""
        return latent_frames

    @abstractmethod
    def loss(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> RewardOutput:
        """Score, loss with a graph to the adapter, and what to log, each [B].

        Args:
            samples: global numbers of the videos, one per prompt.
            timer: ends a lap after each phase.
        """
