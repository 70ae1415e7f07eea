"""Before and after, paired: the same prompts and seeds with and without an adapter.

Axes: P prompts, S videos of each prompt, B videos, T frames, H, W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from Core.backbones import Prompt
from Core.rewards import Reward, RewardOutput, build_reward

RESAMPLES = 10_000


@torch.no_grad()
def score_videos(
    reward: Reward, videos: Tensor, prompts: Sequence[Prompt], fps: float | None = None
) -> RewardOutput:
    """Reward of finished videos [B, 3, T, H, W] in [-1, 1], over the frames it samples.

    Args:
        fps: frames per second they play at, if known.
    """
    index = reward.sample_frames(videos.shape[2], fps)
    frames = videos[:, :, index].transpose(1, 2)
    return reward(frames, [prompt.reward_text for prompt in prompts])


@dataclass(frozen=True)
class PairedGain:
    """What changed from ``before`` to ``after``, both means; ``low`` to ``high`` holds the gain at 95%.

    win_rate: share of videos that improved, ties counted half.
    """

    before: float
    after: float
    gain: float
    low: float
    high: float
    win_rate: float
    videos: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.before:.3f} → {self.after:.3f}  ({self.gain:+.3f}, 95% {self.low:+.3f} to {self.high:+.3f})"


def paired_gain(before: np.ndarray, after: np.ndarray, seed: int = 0) -> PairedGain:
    """Mean difference of scores [P, S] with a bootstrap interval over prompts.

    Prompts are resampled, not videos: videos of one prompt are not independent (Efron & Tibshirani, 1993).
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if before.shape != after.shape or before.ndim != 2:
        raise ValueError(
            f"paired scores must both be [prompts, videos], got {before.shape} and {after.shape}"
        )
    difference = after - before
    per_prompt = difference.mean(axis=1)
    picks = np.random.default_rng(seed).integers(len(per_prompt), size=(RESAMPLES, len(per_prompt)))
    low, high = np.quantile(per_prompt[picks].mean(axis=1), [0.025, 0.975])
    wins = (difference > 0).mean() + (difference == 0).mean() / 2
    means = (before.mean(), after.mean(), difference.mean(), low, high, wins)
    return PairedGain(*map(float, means), videos=difference.size)  # type: ignore[misc, arg-type]


def motion(videos: Tensor) -> Tensor:
    """[B]: mean absolute change from frame to frame, in [0, 2]; 0 for a still. ``videos`` [B, 3, T, H, W]."""
    if videos.shape[2] < 2:
        return torch.zeros(len(videos))
    return videos.diff(dim=2).abs().mean(dim=(1, 2, 3, 4))


def dynamic_degree(video: Tensor, fps: float | None = None) -> float:
    """How far things move in [1, 3, T, H, W]; see the reward of that name. ``fps``: frames per second, if known."""
    return score_videos(build_reward("dynamic_degree"), video, [Prompt("")], fps).score.item()


def diversity(videos: Tensor) -> float:
    """Mean distance between different videos of one prompt, in root-mean-square pixel units of [-1, 1].

    Raises:
        ValueError: a single video has none.
    """
    if len(videos) < 2:
        raise ValueError(f"diversity needs at least 2 videos, got {len(videos)}")
    return float(torch.pdist(videos.flatten(1)).mean() / videos[0].numel() ** 0.5)


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each name over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}
