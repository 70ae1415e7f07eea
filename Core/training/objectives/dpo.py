"""Preference optimisation of diffusion models (Diffusion-DPO, arXiv:2311.12908; Flow-DPO, arXiv:2501.13918).

Of two videos of a prompt the better one should become easier to denoise, relative to the model without the adapter, and
the worse one harder. Online (``dpo``) they are the best and the worst of a group; offline (``dpo_pairs``) a file names
them.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from Core.backbones import EncodedPrompt
from Core.rewards import RewardOutput
from Core.training.rollout import NoisingSettings, Rollout, base_model, squared_distance
from Core.utils.options import option
from Core.utils.timing import Stopwatch

from .base import Batch, Gather
from .group import GroupObjective, GroupSettings


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings(NoisingSettings):
    """Keys of preference optimisation."""

    dpo_beta: float = option(
        2000.0, "how fast a pair counts as learned; the higher, the nearer to the base model", above=0
    )


@dataclass(frozen=True, kw_only=True)
class DPOSettings(GroupSettings, PreferenceSettings):
    """Keys of online DPO."""


def shares_right(margin: Tensor) -> Tensor:
    """[B]: 1 for a pair whose better video the adapter leans to, 0 for the other; a half where it leans to neither."""
    return (margin < 0).to(margin) + 0.5 * (margin == 0).to(margin)


class PreferenceLoss:
    """−log sigmoid(−β/2 · margin) of pairs; squared distances are means over a latent's elements."""

    def __init__(self, rollout: Rollout, beta: float):
        self.rollout, self.beta = rollout, beta

    def __call__(
        self,
        better: Tensor,
        worse: Tensor,
        prompts: Sequence[EncodedPrompt],
        samples: Sequence[int],
        number: int,
    ) -> tuple[Tensor, Tensor]:
        """Loss and margin [B] of pairs of latents [B, C, T, h, w], at draw ``number`` of noise and its level.

        A negative margin says that the adapter has brought the better video nearer than the worse one.
        """
        noise, t = (
            part.repeat(2, *[1] * (part.dim() - 1)) for part in self.rollout.noising("dpo", samples, number)
        )
        x0, process = torch.cat([better, worse]), self.rollout.backbone.process
        z, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)
        with base_model(self.rollout.backbone.denoiser):
            reference = squared_distance(self.prediction(prompts, z, t), target)
        gained = squared_distance(self.prediction(prompts, z, t), target) - reference
        to_better, to_worse = gained.chunk(2)
        margin = to_better - to_worse
        return -F.logsigmoid(-self.beta / 2 * margin), margin.detach()

    def prediction(self, prompts: Sequence[EncodedPrompt], z: Tensor, t: Tensor) -> Tensor:
        """The prediction for the captions alone, each of which stands for a pair."""
        features = self.rollout.features(prompts)
        return self.rollout.backbone.predictor([*features, *features], guided=False)(z, t)


class DPO(GroupObjective):
    """The best against the worst video of each group.

    Every video of a group draws noise for the group's pair, so that each process has as much to do, whichever made
    the two.
    """

    settings_class = DPOSettings
    settings: DPOSettings
    pairs: Tensor  # [groups, 2, C, T, h, w]: best and worst

    def sample(self, prompts: Sequence[EncodedPrompt], samples: Sequence[int]) -> Tensor:
        return self.rollout.finished(self.backbone.predictor(self.rollout.features(prompts)), samples)

    def collect(self, batches: Sequence[Batch], gather: Gather, timer: Stopwatch) -> None:
        super().collect(batches, gather, timer)
        numbers = gather(torch.tensor([sample for _, samples in batches for sample in samples]))
        z = gather(torch.cat([self.videos[samples[0]] for _, samples in batches]))
        self.videos.clear()
        groups = z[numbers.argsort()].unflatten(0, (-1, self.group_size))
        compared = self.comparison
        ranked = compared.advantages.view(-1, self.group_size)
        rows = torch.arange(len(groups))
        self.pairs = self.keep(
            torch.stack([groups[rows, ranked.argmax(1)], groups[rows, ranked.argmin(1)]], 1).to(
                self.backbone.device
            )
        )
        timer.lap("gather")

    def losses(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> Iterator[RewardOutput]:
        count, loss = self.settings.levels_per_video, PreferenceLoss(self.rollout, self.settings.dpo_beta)
        groups = [(sample - self.comparison.first) // self.group_size for sample in samples]
        better, worse = (self.latents(side, samples) for side in self.pairs[groups].unbind(1))
        for number in range(count):
            value, margin = loss(better, worse, prompts, samples, self.update * count + number)
            yield self.output(value / count, samples, pairs_right=shares_right(margin))
            timer.lap("gradient_steps")
