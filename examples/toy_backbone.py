"""A model family in one file: each caption is painted as one plain colour, which the denoiser reads off its words.

docs/adding-a-backbone.md explains it method by method. Run it on the demo's prompts:

    python examples/toy_backbone.py CONFIG --backbone toy [flags]

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, F chosen frames, H, W pixels,
L words, D text width, N sampling steps.
"""

import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Core.backbones import BACKBONES, Backbone, TextEncoder, VideoSpec
from Core.backbones.base import VelocityObserver, gather_frames, pad_text
from Core.cli import main
from Core.utils import rng as draws

WIDTH = 32
SHRINK = 8  # pixels per latent row and column


class WordVectors(TextEncoder):
    """A fixed random vector for each word."""

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        return [torch.stack([self.vector(word) for word in caption.split()]) for caption in captions]

    def vector(self, word: str) -> Tensor:
        return torch.randn(WIDTH, generator=draws.generator(0, "word", word))


class Painter(nn.Module):
    """Velocity that leads from any noise straight to a caption's colour."""

    def __init__(self):
        super().__init__()
        self.colour = nn.Linear(WIDTH, 3)

    def forward(self, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """z [B, 3, T, h, w], t [B] in (0, 1000], text [B, D] → dz/dt, shaped as z."""
        colour = torch.tanh(self.colour(text))[:, :, None, None, None]
        return (colour - z) * (1000 / t)[:, None, None, None, None]


class Toy(Backbone):
    """The family: RGB latents an eighth as high and wide as the video, and as many frames."""

    lora_targets = ("colour",)

    def __init__(self, video: VideoSpec, steps: int, device: torch.device):
        self.video, self.num_sampling_steps, self.device, self.dtype = video, steps, device, torch.float32

    @classmethod
    def frame_size(cls, resolution: str, aspect_ratio: str) -> tuple[int, int]:
        raise ValueError("the toy knows no named resolutions; set image_size=(height, width)")

    @classmethod
    def frame_count(cls, num_frames: str | int) -> int:
        return int(num_frames)

    @classmethod
    def count_latent_frames(cls, num_frames: int, vae: dict) -> int:
        return num_frames

    @classmethod
    def config_errors(cls, config) -> list[str]:
        steps = config.scheduler.get("num_sampling_steps")
        return [] if steps else ["scheduler.num_sampling_steps is missing; set it to a number"]

    @classmethod
    def from_config(cls, config, device: torch.device) -> "Toy":
        return cls(config.video, config.scheduler["num_sampling_steps"], device)

    @property
    def text_identity(self) -> str:
        return f"toy word vectors of width {WIDTH}"

    def caption(self, prompt: str) -> str:
        return prompt.lower()

    def text_encoder(self) -> WordVectors:
        return WordVectors()

    def fetch(self, text_encoder: bool = True) -> list[str]:
        return []

    def load(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.denoiser = Painter().to(self.device).eval().requires_grad_(False)

    def latent_shape(self) -> tuple[int, int, int, int]:
        return 3, self.video.num_frames, self.video.height // SHRINK, self.video.width // SHRINK

    def timesteps(self, batch: int) -> Tensor:
        steps = torch.arange(self.num_sampling_steps, 0, -1) / self.num_sampling_steps
        return (self.num_timesteps * steps)[:, None].expand(-1, batch).to(self.device)

    def velocity(
        self,
        text: Sequence[Tensor],
        *,
        guided: bool = True,
        null_grad: bool = True,
        observe: VelocityObserver | None = None,
    ) -> Callable[..., Tensor]:
        features, mask = pad_text(text, self.device)
        mean = features.sum(1) / mask.sum(1, keepdim=True)

        def velocity(z: Tensor, t: Tensor, generated: Tensor | None = None) -> Tensor:
            v = self.denoiser(z, t, mean)
            if observe and torch.is_grad_enabled():
                observe(z, t, v)
            return v

        return velocity

    def decode(self, z: Tensor) -> Tensor:
        return F.interpolate(z, scale_factor=(1, SHRINK, SHRINK), mode="nearest")

    def decode_frames(self, z: Tensor, index: Tensor) -> Tensor:
        return self.decode(gather_frames(z, index)).squeeze(2).unflatten(0, index.shape)

    def enable_checkpointing(self, keep_attention: bool = False) -> None:
        """Nothing here is worth recomputing."""


BACKBONES["toy"] = Toy

if __name__ == "__main__":
    sys.exit(main())
