"""Rewards whose weights are not here: networks of the published sizes, with the scorers' own preprocessing where it is
that of CLIP.

Axes: N images, B videos, F frames of each, H rows, W columns.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from Core.rewards import Reward, required_weights
from Core.rewards.base import ImageReward, RewardInfo
from Core.rewards.mixture import Mixture
from Core.rewards.preprocess import ImageTransform
from Core.rewards.registry import construct
from Core.utils.hub import Weight, present

QWEN_PROMPT = 800  # tokens of the longer of the two authors' texts with a caption, rounded up
SMALL = 500_000_000  # bytes of weights that are read, to run a scorer's own code


@dataclass(frozen=True)
class Real:
    """A network of published size. shape: of an input. frames: in it. run: input → output."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    frames: int = 1
    run: Callable[[Any, Tensor], Tensor] = lambda model, x: model(pixel_values=x).last_hidden_state


@functools.cache
def clip_vision(layers: int, width: int, heads: int, patch: int) -> Real:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        patch_size=patch,
    )  # fmt: skip
    return Real(lambda: CLIPVisionModel(config), (1, 3, 224, 224))


@functools.cache
def qwen2_vl(width: int, inner: int, layers: int, heads: int, frames: int) -> Real:
    """448×448 pixels a frame: 32×32 patches, of which 4 make a token, for every two frames."""
    from transformers import Qwen2VLConfig

    from Core.rewards.qwen2_vl import Qwen2VL

    text = {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 152_000,
        "num_attention_heads": heads, "num_key_value_heads": heads // 6 if width == 1536 else 4,
    }  # fmt: skip
    config = Qwen2VLConfig(text_config=text, vision_config={"hidden_size": width}, attn_implementation="sdpa")
    times = math.ceil(frames / 2)

    def run(model: Any, patches: Tensor) -> Tensor:
        seen = model.see(patches, (times, 32, 32))
        return model.read(torch.cat([seen, seen.new_zeros(1, QWEN_PROMPT, width)], dim=1))

    return Real(lambda: Qwen2VL(config).to_empty(device="cpu"), (1, times, 1024, 1176), frames, run)


@functools.cache
def image_reward() -> Real:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224
    )
    text = BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)

    class Blip(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision = BlipVisionModel(vision)
            self.text = BlipTextModel(text, add_pooling_layer=False)

        def forward(self, pixel_values: Tensor) -> Any:
            seen = self.vision(pixel_values=pixel_values).last_hidden_state
            ids = torch.zeros(1, 35, dtype=torch.long)
            return self.text(input_ids=ids, encoder_hidden_states=seen)

    return Real(Blip, (1, 3, 224, 224))


@functools.cache
def siglip() -> Real:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14,
        image_size=384,
    )  # fmt: skip
    return Real(lambda: SiglipVisionModel(config), (1, 3, 384, 384))


@functools.cache
def yolos() -> Real:
    from transformers import YolosConfig, YolosModel

    config = YolosConfig(
        hidden_size=384, intermediate_size=1536, num_attention_heads=6, image_size=[512, 864],
        use_mid_position_embeddings=False,
    )  # fmt: skip
    return Real(lambda: YolosModel(config), (1, 3, 512, 864))


@functools.cache
def videomae() -> Real:
    from transformers import VideoMAEConfig, VideoMAEModel

    return Real(lambda: VideoMAEModel(VideoMAEConfig()), (1, 16, 3, 224, 224), 16)


@functools.cache
def dino() -> Real:
    from transformers import ViTConfig, ViTModel

    return Real(lambda: ViTModel(ViTConfig(), add_pooling_layer=False), (1, 3, 224, 224))


@functools.cache
def clip_l14() -> Real:
    return clip_vision(24, 1024, 16, 14)


@functools.cache
def clip_h14() -> Real:
    return clip_vision(32, 1280, 16, 14)


# The networks that a frame goes through; text features are computed once per prompt and not counted.
SIZES: dict[str, Callable[[], Real]] = {
    **dict.fromkeys(("aesthetic", "clip_score", "compression", "incompressibility"), clip_l14),
    **dict.fromkeys(("rainy", "snowy", "weather"), clip_l14),
    **dict.fromkeys(("hps", "pick_score"), clip_h14),
    "aesthetic_v2_5": siglip,
    "image_reward": image_reward,
    "hpsv3": lambda: qwen2_vl(3584, 18944, 28, 28, frames=1),
    "videoalign": lambda: qwen2_vl(1536, 8960, 28, 12, frames=8),
    "actpred": videomae,
    "object_detection": yolos,
    "subject_consistency": dino,
    "background_consistency": lambda: clip_vision(12, 768, 12, 32),
}
# Of what lies on the device beside them and runs once a prompt: CLIP's text halves.
TEXT_PARAMETERS = {"clip_score": 123_000_000, "hps": 354_000_000, "pick_score": 354_000_000}


class SizedScorer(ImageReward):
    """A scorer of published size, on frames brought to the size that its network takes."""

    info = RewardInfo(name="sized", summary="a network of published size", range="any")

    def __init__(self, name: str):
        super().__init__()
        self.real = SIZES[name]()
        self.network = self.real.build()
        self.text = nn.Module()  # a child, which is cast as the network is
        self.text.register_buffer("weights", torch.empty(TEXT_PARAMETERS.get(name, 0)))
        *_, height, width = self.real.shape if self.real.shape[1] == 3 else (224, 224)
        self.transform = ImageTransform(height=height, width=width, fit="pad")

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = self.transform(images).to(self.dtype)
        if self.real.shape[1] == 3:
            return self.real.run(self.network, pixels).flatten(1).float().mean(1)
        clips = math.ceil(len(images) / self.real.frames)
        inputs = (pixels.new_zeros(self.real.shape) + pixels.mean() for _ in range(clips))
        scores = [self.real.run(self.network, one).float().mean() for one in inputs]
        return torch.stack(scores).mean().expand(len(images))

    def loss(self, score: Tensor) -> Tensor:
        return 1 - score


def here(name: str, args: Mapping[str, Any] | None) -> bool:
    """Whether a scorer's own code can run: all it reads is on this machine, and small."""
    weights = required_weights(name, args)
    return all(is_small(weight) for weight in weights)


def is_small(weight: Weight) -> bool:
    found = present(weight)
    if found is None or (found.is_dir() and weight.lacks(found)):
        return False
    files = found.rglob("*") if found.is_dir() else [found]
    return sum(file.stat().st_size for file in files if file.is_file()) < SMALL


def real_scorers(
    reward_fn: str | Mapping[str, float], args: Mapping[str, Any] | None
) -> dict[str, Reward | None]:
    """The parts of a reward by name; None for each whose weights are not here. Builds real networks.

    Raises:
        ValueError: the size of one that is not here is not known.
    """
    given = args or {}
    parts: dict[str, Mapping[str, Any]] = (
        {name: given.get(name) or {} for name in reward_fn}
        if isinstance(reward_fn, Mapping)
        else {reward_fn: given}
    )
    if unknown := [name for name, own in parts.items() if name not in SIZES and not here(name, own)]:
        raise ValueError(
            f"the size of reward {unknown[0]!r} is not known, and its weights are not on this machine; fetch them, or "
            f"estimate with one of {', '.join(SIZES)}"
        )
    return {name: construct(name, own) if here(name, own) else None for name, own in parts.items()}


def joined(
    reward_fn: str | Mapping[str, float], parts: Mapping[str, Reward | None], dtype: torch.dtype
) -> Reward:
    """The reward of a configuration, with networks of published size for the parts that are None."""
    built = {name: part or SizedScorer(name) for name, part in parts.items()}
    reward = Mixture(built, reward_fn) if isinstance(reward_fn, Mapping) else next(iter(built.values()))
    return reward.cast(dtype)
