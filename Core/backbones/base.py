"""What the sampler, the decoder, the adapter and the prompts need of a text-to-video model family.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, F chosen frames, H, W pixels,
L text tokens, D text width, N sampling steps.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from Core.utils.hub import Weight

# (latent [B, C, T, h, w], timesteps [B], velocity of the captions without guidance [B, C, T, h, w])
VelocityObserver = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class VideoSpec:
    """Size of the videos to make: pixels, frames and frames per second."""

    height: int
    width: int
    num_frames: int
    fps: float


class TextEncoder(ABC):
    """Turns captions into features; built for as long as captions are encoded, then freed."""

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One [L, D] tensor per caption, trimmed to the caption's own tokens."""


class Backbone(ABC):
    """A text-to-video model family.

    Building one loads nothing. ``text_encoder()`` comes first, so that its memory is free again before
    ``load()`` brings the denoiser and the VAE to the device, frozen.

    Attributes:
        denoiser: the network adapters attach to; set by ``load``, replaced by the adapter's wrapper.
        device, dtype: of the frozen networks.
        lora_targets: suffixes of the linear layers adapted by default.
        num_sampling_steps: Euler steps of one video.
        num_timesteps: length of the time axis that ``timesteps`` and ``velocity`` speak.
    """

    denoiser: nn.Module
    device: torch.device
    dtype: torch.dtype
    lora_targets: tuple[str, ...]
    num_sampling_steps: int
    num_timesteps: int = 1000

    @classmethod
    @abstractmethod
    def frame_size(cls, resolution: str, aspect_ratio: str) -> tuple[int, int]:
        """(height, width) in pixels of a named resolution; ValueError names those there are."""

    @classmethod
    @abstractmethod
    def frame_count(cls, num_frames: str | int) -> int:
        """Frames of a named duration, or the number itself; ValueError names the durations."""

    @classmethod
    @abstractmethod
    def count_latent_frames(cls, num_frames: int, vae: dict) -> int:
        """T of a video, from the config alone."""

    @classmethod
    @abstractmethod
    def config_errors(cls, config) -> list[str]:
        """What is wrong with the family's entries of a configuration; loads nothing."""

    @classmethod
    def prompt_errors(cls, config, prompts: Sequence) -> list[str]:
        """What is wrong with the prompts' segments, references and mask strategies; loads no network."""
        conditioned = [p.text() for p in prompts if p.reference or p.mask_strategy]
        return [f"{cls.__name__} takes no references; remove those of {text!r}" for text in conditioned]

    @classmethod
    @abstractmethod
    def from_config(cls, config, device: torch.device) -> "Backbone":
        """Build from a validated configuration."""

    @property
    @abstractmethod
    def text_identity(self) -> str:
        """Names weights, tokenizer and length: what cached features depend on besides the caption."""

    @abstractmethod
    def caption(self, prompt: str) -> str:
        """The text the model is conditioned on, from a plain prompt: cleaned, with the model's suffixes."""

    @abstractmethod
    def text_encoder(self) -> TextEncoder:
        """Load the text encoder."""

    @abstractmethod
    def fetch(self, text_encoder: bool = True) -> list[str]:
        """Bring all weights, or all but the text encoder's, to this machine; a sentence for each that cannot be had."""

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
    def velocity(
        self,
        text: Sequence[Tensor],
        *,
        guided: bool = True,
        null_grad: bool = True,
        observe: VelocityObserver | None = None,
    ) -> Callable[..., Tensor]:
        """Velocity for a batch of caption features: (z, t, generated) → dz/dt, see ``Velocity``.

        Args:
            guided: with classifier-free guidance; False gives the velocity of the captions alone.
            null_grad: whether guidance's null branch keeps a graph where the caption's does.
            observe: sees the captions' own velocity at every step that keeps its graph.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, C, T, h, w] → video [B, 3, frames, H, W], about [-1, 1]."""

    @abstractmethod
    def decode_frames(self, z: Tensor, index: Tensor) -> Tensor:
        """Latents and latent frame numbers [B, F] → frames [B, F, 3, H, W], differentiable."""

    @abstractmethod
    def enable_checkpointing(self, keep_attention: bool = False) -> None:
        """Recompute activations in the backward pass, once, wherever gradients flow.

        Args:
            keep_attention: all but the outputs of the denoiser's attention.
        """

    def compile_blocks(self) -> None:
        """Have the denoiser's blocks compiled when they next run; optional, or the configuration refuses it."""
        raise NotImplementedError

    def residual_branches(self) -> list[nn.Module]:
        """Attentions and MLPs, whose outputs the denoiser's blocks add to their tokens; optional for prefix_cache."""
        raise NotImplementedError

    def encode_references(self, paths: Sequence[str]) -> list[list[Tensor]]:
        """Latents [C, T, h, w] of each sample's reference files, given as paths joined by ``;``."""
        raise ValueError(f"{type(self).__name__} cannot be conditioned on references; remove reference_path")

    def condition(
        self,
        z: Tensor,
        references: list[list[Tensor]],
        strategies: list[str],
        loop: int,
        align: int | None,
    ) -> Tensor | None:
        """Put reference frames into the noise ``z``, in place; the mask of ``euler_sample`` or None."""
        return None

    def continue_clip(
        self,
        video: Tensor,
        references: list[list[Tensor]],
        strategies: list[str],
        loop: int,
        length: int,
        edit: float,
    ) -> tuple[list[list[Tensor]], list[str]]:
        """References and strategies that make ``loop`` begin with the end of ``video``.

        Args:
            video: the clip before, [B, 3, frames, H, W] in [-1, 1].
            length: latent frames taken over; ``overlap(length)`` pixel frames.
            edit: how far they may change, 0 to 1.
        """
        raise ValueError(f"{type(self).__name__} cannot continue a clip; set loop=1")

    def overlap(self, latent_frames: int) -> int:
        """Pixel frames that the first ``latent_frames`` latent frames of a clip make."""
        raise ValueError(f"{type(self).__name__} cannot continue a clip; set loop=1")


def check_weights(key: str, source: str | None) -> list[str]:
    """A sentence where ``source`` is a path that does not exist; hub ids are looked up when they load."""
    if source is None:
        return [f"{key} is missing; set it to a hub id (organisation/name) or the path of a local copy"]
    if not Weight(source=str(source)).is_local or Path(source).expanduser().exists():
        return []
    return [f"{key}: there is no file or folder {str(source)!r}; give an existing path or a hub id"]


def file_identity(source: str) -> str:
    """A name that changes with the files behind ``source``, wherever they lie; a hub id stands for itself.

    Of each file count its name, its size and ``_samples`` of its content; hidden ones do not count.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return str(source)
    folder = path if path.is_dir() else path.parent
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()} {file.stat().st_size}\0".encode())
            digest.update(_samples(file))
    return digest.hexdigest()


def _samples(file: Path) -> bytes:
    """All of a file up to 1 MiB, and of a larger one 64 evenly spaced pieces of 16 KiB, its first and last included."""
    size, count, length = file.stat().st_size, 64, 1 << 14
    with file.open("rb") as content:
        if size <= count * length:
            return content.read()
        pieces = []
        for number in range(count):
            content.seek(number * (size - length) // (count - 1))
            pieces.append(content.read(length))
    return b"".join(pieces)


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
