"""A model family in one file: each caption is painted as one plain colour, which the denoiser reads off its words.

docs/adding-a-backbone.md explains it method by method. Run it:

    python examples/toy_backbone.py examples/toy_config.py [flags]

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, F chosen frames, H, W pixels,
L words, D text width, N sampling steps.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Core.backbones import (
    BACKBONES,
    Backbone,
    FamilySettings,
    Features,
    ModelSettings,
    TextEncoder,
    VideoSettings,
)
from Core.backbones.base import PredictionObserver, gather_frames, pad_text
from Core.cli import main
from Core.sampling.euler import Predict
from Core.utils import rng
from Core.utils.hub import Weight, locate
from Core.utils.options import video_option
from Core.utils.state_dict import load_state

WIDTH = 32
SHRINK = 8  # pixels per latent row and column


@dataclass(frozen=True, kw_only=True)
class ToySettings(FamilySettings):
    """Keys of the toy."""

    palette: str = video_option("toy/palette", "hub id or local file of the colours of words")
    sampling_steps: int = video_option(8, "Euler steps of a video", minimum=1)


class WordVectors(TextEncoder):
    """A fixed random vector for each word."""

    def encode(self, captions: Sequence[str]) -> list[Features]:
        return [{"words": torch.stack([self.vector(word) for word in c.split()])} for c in captions]

    def vector(self, word: str) -> Tensor:
        return torch.randn(WIDTH, generator=rng.generator(0, "word", word))


class Painter(nn.Module):
    """Velocity that leads from any noise straight to a caption's colour."""

    def __init__(self):
        super().__init__()
        self.colour = nn.Linear(WIDTH, 3)

    def forward(self, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """z [B, 3, T, h, w], t [B] in (0, 1000], text [B, D] → velocity, shaped as z."""
        colour = torch.tanh(self.colour(text))[:, :, None, None, None]
        return (colour - z) * (1000 / t)[:, None, None, None, None]


class Toy(Backbone):
    """The family: RGB latents an eighth as high and wide as the video, and as many frames."""

    settings_class = ToySettings
    weights = {"palette": Weight(source="toy/palette", kind="file", file="palette.safetensors", size=600)}
    lora_targets = ("colour",)
    obeys = frozenset({"dtype"})

    settings: ToySettings

    @classmethod
    def frame_size(cls, resolution: str, aspect_ratio: str) -> tuple[int, int]:
        raise ValueError("the toy knows no named resolutions; set image_size=(height, width)")

    @classmethod
    def frame_count(cls, num_frames: str | int, fps: float) -> int:
        if not isinstance(num_frames, int):
            raise ValueError(f"the toy knows no durations such as {num_frames!r}; set num_frames to a number")
        return num_frames

    @classmethod
    def count_latent_frames(cls, num_frames: int, settings: ToySettings) -> int:
        return num_frames

    @classmethod
    def num_sampling_steps(cls, settings: ToySettings) -> int:
        return settings.sampling_steps

    @classmethod
    def config_errors(
        cls, settings: ToySettings, models: ModelSettings, video: VideoSettings, training: bool
    ) -> list[str]:
        size = video.image_size or (SHRINK, SHRINK)
        fits = all(side % SHRINK == 0 for side in size)
        return [] if fits else [f"image_size must be multiples of {SHRINK}, got {tuple(size)}"]

    @property
    def text_identity(self) -> str:
        return f"toy word vectors of width {WIDTH}"

    def caption(self, text: str) -> str:
        return text.lower()

    def text_encoder(self) -> WordVectors:
        return WordVectors()

    def load_denoiser(self) -> nn.Module:
        painter = Painter()
        painter.load_state_dict(load_state(locate(self.weights_of(self.settings)["palette"])))
        return painter

    def latent_shape(self) -> tuple[int, int, int, int]:
        return 3, self.video.num_frames, self.video.height // SHRINK, self.video.width // SHRINK

    def timesteps(self, batch: int) -> Tensor:
        count = self.settings.sampling_steps
        steps = torch.arange(count, 0, -1) / count
        return (self.process.num_timesteps * steps)[:, None].expand(-1, batch).to(self.device)

    def predictor(
        self,
        text: Sequence[Features],
        *,
        guided: bool = True,
        null_grad: bool = True,
        observe: PredictionObserver | None = None,
    ) -> Predict:
        words, mask = pad_text([caption["words"] for caption in text], self.device)
        mean = words.sum(1) / mask.sum(1, keepdim=True)

        def predict(z: Tensor, t: Tensor, generated: Tensor | None = None) -> Tensor:
            velocity = self.denoiser(z, t, mean)
            if observe and torch.is_grad_enabled():
                observe(z, t, velocity)
            return velocity

        return predict

    def decode(self, z: Tensor) -> Tensor:
        return F.interpolate(z, scale_factor=(1, SHRINK, SHRINK), mode="nearest")

    def decode_frames(self, z: Tensor, index: Tensor, context: str = "isolated", reach: int = 1) -> Tensor:
        return self.decode(gather_frames(z, index)).squeeze(2).unflatten(0, index.shape)


BACKBONES.register("toy", Toy)

if __name__ == "__main__":
    sys.exit(main())
