"""Compare base model and adapter on the demo: the same held-out captions and noise, scored by reward and oracle.

Axes: P prompts, T frames, H, W pixels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from Core.backbones import Backbone, EncodedPrompt, Prompt
from Core.build import build_backbone
from Core.cli import run
from Core.config import Config
from Core.data.video import save_video
from Core.evaluation.compare import Row, normal, result_of, write_tables
from Core.evaluation.metrics import PairedGain, motion, paired_gain, score_videos
from Core.generation.generate import generate
from Core.generation.jobs import Variant, adapted, read_variants
from Core.generation.manifest import MANIFEST, Sample, plan_samples
from Core.rewards import Reward, build_reward
from Core.utils.distributed import Distributed
from Core.utils.files import write_whole
from Core.utils.tables import read_table
from Core.utils.terminal import progress_bar
from scripts.demo import oracle, world
from scripts.demo.common import HELDOUT_SEED, heldout, to_pixels, to_uint8

BATCH = 32
SEED = 1  # noise seed
# What a reader of the tables calls the oracle's verdicts, each of them yes or no for a video.
VERDICTS = {"colour_and_shape": "colour and shape right", "direction": "motion right"}


@dataclass(frozen=True)
class Scores:
    """Per video [P]: the trained reward, whether the oracle agrees with the caption (0 or 1), and motion."""

    reward: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    direction: np.ndarray
    motion: np.ndarray

    @property
    def colour_and_shape(self) -> np.ndarray:
        return self.colour * self.shape


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

    @property
    def distance(self) -> str:
        """The true videos' reward and the share of the way to it, in a sentence."""
        return f"true videos score {self.true_reward:.1f}: training closed {self.share_of_distance:.0%} of the gap"


def train(config: Config) -> Path:
    """Train as a user's command would; the run folder.

    Raises:
        SystemExit: the run stopped before its last step, so there is nothing to compare.
    """
    folder = run(config)
    done = len(read_table(folder / "metrics.csv"))
    asked = config.optimizer.max_train_steps
    if done < asked:
        raise SystemExit(f"training was stopped after step {done} of {asked}; continue it with --resume auto")
    return folder


def score(reward: Reward, videos: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """``videos`` [P, 3, T, H, W] in [-1, 1]."""
    parts = [
        score_videos(reward, videos[i : i + BATCH], prompts[i : i + BATCH]).score
        for i in range(0, len(videos), BATCH)
    ]
    said = [world.parse_caption(prompt.reward_text) for prompt in prompts]
    seen = [oracle.read(clip) or {} for clip in to_uint8(videos.transpose(1, 2))]
    right = {
        name: np.array([float(s.get(name) == t[name]) for s, t in zip(seen, said, strict=True)])
        for name in ("colour", "shape", "direction")
    }
    return Scores(torch.cat(parts).numpy(), **right, motion=motion(videos).numpy())


def generate_all(
    backbone: Backbone,
    samples: Sequence[Sample],
    texts: Sequence[EncodedPrompt],
    variant: Variant,
    quiet: bool,
) -> Tensor:
    """Videos [P, 3, T, H, W] of a variant; equal samples start from equal noise."""
    made = []
    with adapted(backbone, variant, 1.0), progress_bar(hidden=quiet) as bar:
        task = bar.add_task(f"generating, {variant.name}", total=len(samples))
        for start in range(0, len(samples), BATCH):
            own = slice(start, start + BATCH)
            made.append(generate(backbone, samples[own], texts[own]))
            bar.advance(task, len(made[-1]))
    return torch.cat(made)


class HeldOut:
    """``count`` held-out captions with their noise, and what base model and true videos score on them.

    Args:
        config: names model and reward; adapters trained with others cannot be compared here.
    """

    def __init__(self, config: Config, count: int, scene_seed: int = HELDOUT_SEED):
        scenes, self.captions = heldout(count, scene_seed)
        self.prompts = config.backbone.parse_prompts(self.captions)
        self.backbone, self.texts = build_backbone(config, Distributed(), self.prompts)
        reward = config.reward
        self.reward = build_reward(reward.reward_fn, reward.arguments, device=self.backbone.device)
        self.samples, self.quiet = plan_samples(self.prompts, 1, SEED), config.run.verbose < 1
        truth = to_pixels(np.stack([world.render(scene) for scene in scenes])).transpose(1, 2)
        self.true_reward = float(score(self.reward, truth, self.prompts).reward.mean())
        self.before, self.videos_before = self.videos(None)

    def videos(self, adapter: str | None) -> tuple[Scores, np.ndarray]:
        """Scores of an adapter's videos, or the base model's, and the videos ``uint8 [P, T, H, W, 3]``."""
        (variant,) = read_variants([adapter])
        videos = generate_all(self.backbone, self.samples, self.texts, variant, self.quiet)
        return score(self.reward, videos, self.prompts), to_uint8(videos.transpose(1, 2))

    def compare(self, adapter: str) -> Comparison:
        after, videos_after = self.videos(adapter)
        return Comparison(
            self.captions, self.before, after, self.true_reward, self.videos_before, videos_after
        )


def compare(config: Config, adapter: str, count: int, scene_seed: int = HELDOUT_SEED) -> Comparison:
    """Compare the base model and ``adapter`` on ``count`` held-out captions."""
    return HeldOut(config, count, scene_seed).compare(adapter)


def save_evaluation(result: Comparison, config: Config, adapter: str, folder: Path) -> None:
    """Write the comparison as an evaluation leaves one, for the report and the gallery: videos and tables."""
    base, tuned = read_variants([None, adapter])
    samples = plan_samples(config.backbone.parse_prompts(result.captions), 1, SEED)
    training = [prompt.reward_text for prompt in config.prompt_list]
    rows = save_variant(base, samples, result.videos_before, result.before, training, config, folder)
    rows += save_variant(tuned, samples, result.videos_after, result.after, training, config, folder)
    settings = [tuned.settings(config) | {"name": tuned.name}]
    found = result_of(rows, settings, {"reward": {}}, set(), training)
    write_tables(folder, rows, found | {"yes_or_no": list(VERDICTS.values()), "notes": [result.distance]})


def save_variant(
    variant: Variant,
    samples: Sequence[Sample],
    videos: np.ndarray,
    scores: Scores,
    training: Sequence[str],
    config: Config,
    folder: Path,
) -> list[Row]:
    """Write a variant's videos ``uint8 [P, T, H, W, 3]`` and their manifest; their rows of the table."""
    seen, settings = {normal(text) for text in training}, variant.settings(config)
    measures = {"reward": scores.reward}
    measures |= {title: getattr(scores, name) for name, title in VERDICTS.items()} | {"motion": scores.motion}
    rows, lines = [], []
    for place, (sample, video) in enumerate(zip(samples, videos, strict=True)):
        path = folder / "videos" / variant.name / sample.name
        file = save_video(to_pixels(video).transpose(0, 1), path, config.video.file_fps)
        lines.append(json.dumps({**sample.identity, "copy": sample.copy, "file": file.name, **settings}))
        text, own = sample.prompt.reward_text, {name: float(all_[place]) for name, all_ in measures.items()}
        name = str(file.relative_to(folder))
        rows.append(Row(variant.name, sample.index, text, sample.seed, name, normal(text) in seen, own))
    write_whole(folder / "videos" / variant.name / MANIFEST, "".join(f"{line}\n" for line in lines))
    return rows
