"""What the sampler, the decoder, the adapter and the prompts need of a text-to-video model family.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, F chosen frames, H, W pixels,
L text tokens, D text width, N sampling steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class VideoSpec:
    """Size of the videos to make: pixels, frames and frames per second."""

    height: int
    width: int
    num_frames: int
    fps: float


class TextEncoder(ABC):
    """Turns captions into features; built for as long as captions are encoded, then freed."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Names weights, tokenizer and length: what cached features depend on besides the caption."""

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One [L, D] tensor per caption, trimmed to the caption's own tokens."""


class Backbone(ABC):
    """A text-to-video model family.

    Building one loads nothing. ``text_encoder()`` comes first, so that its memory is free again before
    ``load()`` brings the denoiser and the VAE to the device, frozen.

    Attributes:
        denoiser: the network adapters attach to; set by ``load``, replaced by the adapter's wrapper.
        lora_targets: suffixes of the linear layers adapted by default.
        num_sampling_steps: Euler steps of one video.
        num_timesteps: length of the time axis that ``timesteps`` and ``velocity`` speak.
    """

    denoiser: nn.Module
    lora_targets: tuple[str, ...]
    num_sampling_steps: int
    num_timesteps: int = 1000

    @abstractmethod
    def caption(self, prompt: str) -> str:
        """The text the model is conditioned on, from a plain prompt: cleaned, with the model's suffixes."""

    @abstractmethod
    def text_encoder(self) -> TextEncoder:
        """Load the text encoder."""

    @abstractmethod
    def load(self) -> None:
        """Load denoiser and VAE."""

    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, h, w) of one video's latent."""

    @abstractmethod
    def timesteps(self, batch: int) -> Tensor:
        """[N, batch], falling from pure noise."""

    @abstractmethod
    def velocity(self, text: Sequence[Tensor]) -> Callable[..., Tensor]:
        """The guided velocity for a batch of caption features: (z, t, generated) → dz/dt, see ``Velocity``."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, C, T, h, w] → video [B, 3, frames, H, W], about [-1, 1]."""

    @abstractmethod
    def decode_frames(self, z: Tensor, index: Tensor) -> Tensor:
        """Latents and latent frame numbers [B, F] → frames [B, F, 3, H, W], differentiable."""

    @abstractmethod
    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass, once, wherever gradients flow."""


def pad_text(text: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Caption features of unequal length as one batch: [B, L, D] and its mask [B, L]."""
    features = nn.utils.rnn.pad_sequence(list(text), batch_first=True).to(device)
    lengths = torch.tensor([len(t) for t in text])
    mask = torch.arange(features.shape[1])[None] < lengths[:, None]
    return features, mask.to(device)


def gather_frames(z: Tensor, index: Tensor) -> Tensor:
    """Chosen latent frames as single-frame latents: [B, C, T, h, w] and [B, F] → [B·F, C, 1, h, w]."""
    chosen = z.transpose(1, 2)[torch.arange(z.shape[0])[:, None], index]
    return chosen.flatten(0, 1).unsqueeze(2)
