"""Compare base model and adapter on the demo: the same held-out captions and noise, scored by reward and oracle.

Axes: P prompts, T frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from Core.build import build_backbone
from Core.cli import run
from Core.data.prompts import Prompt, parse_prompts
from Core.evaluation.metrics import PairedGain, motion, paired_gain, score_videos
from Core.generation.generate import Sample, generate, plan_samples
from Core.generation.jobs import Variant, adapted, read_variants
from Core.rewards import Reward, build_reward
from Core.training.metric_logging import read_table
from Core.utils.distributed import Runtime
from scripts.demo import oracle, world
from scripts.demo.common import HELDOUT_SEED, heldout, to_pixels, to_uint8

BATCH = 32
SEED = 1  # noise seed


@dataclass(frozen=True)
class Scores:
    """Per video [P]: the trained reward, whether the oracle agrees with the caption, and motion."""

    reward: np.ndarray
    colour_and_shape: np.ndarray
    direction: np.ndarray
    motion: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Scores of base model, adapter and true videos, and the videos ``uint8 [P, T, H, W, 3]``."""

    captions: list[str]
    before: Scores
    after: Scores
    true_reward: float
    videos_before: np.ndarray
    videos_after: np.ndarray

    def gain(self, name: str) -> PairedGain:
        before, after = getattr(self.before, name), getattr(self.after, name)
        return paired_gain(before[:, None], after[:, None])

    @property
    def share_of_distance(self) -> float:
        """Reward gain as a share of the gap between base-model videos and true videos."""
        gain = self.gain("reward")
        return gain.gain / (self.true_reward - gain.before)


def train(config) -> Path:
    """Train as the command line would; return the run folder.

    Raises:
        SystemExit: the run stopped before its last step, so there is nothing to compare.
    """
    folder = run(config)
    done = len(read_table(folder / "metrics.csv"))
    if done < config.max_train_steps:
        raise SystemExit(
            f"training was stopped after step {done} of {config.max_train_steps}; continue it with --resume auto"
        )
    return folder


def score(reward: Reward, videos: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """``videos`` [P, 3, T, H, W] in [-1, 1]."""
    parts = [
        score_videos(reward, videos[i : i + BATCH], prompts[i : i + BATCH]).score
        for i in range(0, len(videos), BATCH)
    ]
    said = [world.parse_caption(prompt.reward_text) for prompt in prompts]
    seen = [oracle.read(clip) or {} for clip in to_uint8(videos.transpose(1, 2))]
    hits = {
        name: np.array([s.get(name) == t[name] for s, t in zip(seen, said, strict=True)])
        for name in ("colour", "shape", "direction")
    }
    both = (hits["colour"] & hits["shape"]).astype(float)
    return Scores(torch.cat(parts).numpy(), both, hits["direction"].astype(float), motion(videos).numpy())


def generate_all(config, backbone, text, samples: Sequence[Sample], variant: Variant) -> Tensor:
    """Videos [P, 3, T, H, W] of a variant; the same samples start from the same noise."""
    made = []
    bar = tqdm(
        total=len(samples), desc=f"generating, {variant.name}", unit="video", disable=config.verbose < 1
    )
    with adapted(backbone, variant, 1.0):
        for start in range(0, len(samples), BATCH):
            made.append(generate(backbone, text, config, samples[start : start + BATCH]))
            bar.update(len(made[-1]))
    bar.close()
    return torch.cat(made)


def compare(config, adapter: str, count: int, scene_seed: int = HELDOUT_SEED) -> Comparison:
    """Compare base model and ``adapter`` on ``count`` held-out captions."""
    scenes, captions = heldout(count, scene_seed)
    prompts = parse_prompts(captions)
    backbone, text = build_backbone(config, Runtime(), prompts)
    reward = build_reward(config.reward_fn, config.reward_arguments, device=backbone.device)
    samples = plan_samples(prompts, 1, SEED)
    before, after = (
        generate_all(config, backbone, text, samples, variant) for variant in read_variants([None, adapter])
    )
    truth = to_pixels(np.stack([world.render(scene) for scene in scenes])).transpose(1, 2)
    return Comparison(
        captions,
        score(reward, before, prompts),
        score(reward, after, prompts),
        float(score(reward, truth, prompts).reward.mean()),
        to_uint8(before.transpose(1, 2)),
        to_uint8(after.transpose(1, 2)),
    )
