"""DiffusionNFT (arXiv:2509.16117): a contrast of better and worse videos in the loss of pretraining.

Videos come from the sampling policy, a slow copy of the adapter. From it and the trained adapter two predictions are
made, one leaning towards the trained one and one away from it; the first should fit videos that are better than their
group, the second worse ones. Finished videos are all it needs.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from Core.backbones import Backbone, EncodedPrompt
from Core.modules import lora
from Core.modules.ema import Ema
from Core.rewards import Reward, RewardOutput
from Core.training.rollout import KlSettings, NoisingSettings, base_model, squared_distance
from Core.utils.options import option
from Core.utils.timing import Stopwatch

from .group import MAX_ADVANTAGE, GroupObjective, GroupSettings


@dataclass(frozen=True, kw_only=True)
class NFTSettings(GroupSettings, KlSettings, NoisingSettings):
    """Keys of DiffusionNFT."""

    nft_beta: float = option(
        1.0, "β of the loss: how far the two compared predictions are from the sampling policy's", above=0
    )
    policy_decay: float = option(
        0.5,
        "decay of the sampling policy, the adapter's moving average; 0 = the adapter itself",
        minimum=0,
        below=1,
    )
    guided_sampling: bool = option(False, "sample with guidance; the loss does not account for it")


class NFT(GroupObjective):
    """Forward-process reinforcement from finished videos."""

    settings_class = NFTSettings
    settings: NFTSettings

    def __init__(self, settings: NFTSettings, backbone: Backbone, reward: Reward, seed: int):
        super().__init__(settings, backbone, reward, seed)
        self.policy = Ema(lora.parameters(backbone.denoiser), settings.policy_decay)

    def sample(self, prompts: Sequence[EncodedPrompt], samples: Sequence[int]) -> Tensor:
        features = self.rollout.features(prompts)
        with self.policy.applied():
            predict = self.backbone.predictor(features, guided=self.settings.guided_sampling)
            return self.rollout.finished(predict, samples)

    def losses(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> Iterator[RewardOutput]:
        count = self.settings.levels_per_video
        for number in range(count):
            output = self.level_loss(prompts, samples, self.update * count + number)
            yield RewardOutput(output.score, output.loss / count, output.parts)
            timer.lap("gradient_steps")

    def level_loss(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], number: int
    ) -> RewardOutput:
        """r ‖v⁺ − v‖² + (1 − r) ‖v⁻ − v‖² at the draw ``number`` of noise and its level, as means over elements."""
        x0 = self.latents(self.videos[samples[0]], samples)
        noise, t = self.rollout.noising("nft", samples, number)
        z, target = self.backbone.process.add_noise(x0, noise, t), self.backbone.process.target(x0, noise, t)
        with torch.no_grad(), self.policy.applied():
            old = self.prediction(prompts, z, t)
        new, beta = self.prediction(prompts, z, t), self.settings.nft_beta
        share = optimality(self.advantages(samples)).to(x0)
        towards = squared_distance((1 - beta) * old + beta * new, target)
        away = squared_distance((1 + beta) * old - beta * new, target)
        loss = share * towards + (1 - share) * away
        if not self.settings.kl_weight:
            return self.output(loss, samples)
        with base_model(self.backbone.denoiser):
            base = self.prediction(prompts, z, t)
        distance = squared_distance(new, base)
        return self.output(loss + self.settings.kl_weight * distance, samples, base_distance=distance)

    def prediction(self, prompts: Sequence[EncodedPrompt], z: Tensor, t: Tensor) -> Tensor:
        """The prediction for the captions alone, with the weights as they are now."""
        return self.backbone.predictor(self.rollout.features(prompts), guided=False)(z, t)

    def end_step(self) -> None:
        super().end_step()
        self.policy.update()

    def state(self) -> Mapping[str, Any]:
        return {"policy": self.policy.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.policy.load(state["policy"])

    def tensors(self) -> list[Tensor]:
        return list(self.policy.average.values())


def optimality(advantages: Tensor) -> Tensor:
    """r in [0, 1]: the probability that a video counts as good; 1/2 for one like its group."""
    return (advantages / MAX_ADVANTAGE / 2 + 0.5).clamp(0, 1)
