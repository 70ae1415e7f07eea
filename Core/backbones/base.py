"""What a model family is: what it states about itself, and what the engine asks of it.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, F chosen frames, H, W pixels,
L text tokens, D text width, N sampling steps.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from Core.modules import base_adapters, sharding
from Core.modules.base_adapters import BaseAdapter
from Core.modules.frozen_conv import forget_conv_inputs
from Core.modules.quantization import store_linears_in_fp8, store_linears_in_nf4
from Core.modules.streaming import stream
from Core.sampling.euler import DenoisingStep, Predict, Process, RectifiedFlow, Step
from Core.sampling.guidance import PredictionObserver
from Core.sampling.no_grad_steps import lean_steps
from Core.utils.damage import loading, refuse_damaged
from Core.utils.hub import Weight, locate, present
from Core.utils.options import Bounds, free_option, option, video_option

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}
# What a text encoder makes of one caption: tensors by name, without a batch axis.
Features = Mapping[str, Tensor]


@dataclass(frozen=True)
class VideoSpec:
    """Size of the videos to make: pixels, frames and frames per second."""

    height: int
    width: int
    num_frames: int
    fps: float


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """Size, length and frame rate of the videos, and of their files."""

    resolution: str | None = video_option("240p", "column of the resolution table, such as `240p`")
    aspect_ratio: str | None = video_option("3:4", "height:width, a row of the resolution table")
    image_size: tuple[int, int] | None = video_option(
        None, "(height, width) in pixels; replaces resolution and aspect_ratio", minimum=1, maximum=1 << 16
    )
    num_frames: str | int = video_option(
        "2s",
        "duration (`2s`, `4s`, `8s`, `16s`) or number of frames; 1 makes images",
        minimum=1,
        maximum=1 << 16,
    )
    fps: float = video_option(24, "frames per second the model is conditioned on", minimum=0.1, maximum=1000)
    frame_interval: int = video_option(
        1, "files play at fps / frame_interval", minimum=1, maximum=1000, may_change=True
    )
    save_fps: float | None = video_option(
        None,
        "frames per second of the files; replaces fps / frame_interval",
        minimum=0.1,
        maximum=1000,
        may_change=True,
    )
    save_gif: bool = video_option(False, "also write an animated GIF of each video", may_change=True)

    @property
    def file_fps(self) -> float:
        return self.save_fps or self.fps / self.frame_interval


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model family, and how its frozen networks are stored and run."""

    backbone: str = video_option("opensora", "model family")
    dtype: Literal["bf16", "fp16", "fp32", "fp8"] = video_option(
        "bf16", "dtype of the frozen weights; `fp8` stores the denoiser in 8-bit float and computes in bf16"
    )
    base_quant: Literal["none", "nf4"] = video_option(
        "none",
        "`nf4` stores the frozen denoiser's linear layers in 4 bits (bitsandbytes) and computes in dtype",
    )
    base_adapters: list[str | dict] = video_option(
        [],
        "adapters merged into the frozen denoiser before anything else: paths, or dict(path=…, strength=1.0)",
    )
    text_encoding: Literal["device", "8bit", "cpu"] = video_option(
        "device",
        "where captions are encoded: on the `device`, there in `8bit` (bitsandbytes), or on the `cpu`",
    )
    text_cache: str = free_option("~/.cache/vader/text", "folder of cached prompt embeddings", path=True)
    compile_blocks: bool = option(
        False, "compile the denoiser's blocks for training (torch.compile); the first step is slow"
    )
    shard_frozen: bool = free_option(
        False,
        "split the frozen denoiser, and a reward that is a language model, over all processes; each gathers a block's "
        "weights while it runs",
    )
    stream_blocks: bool = free_option(
        False,
        "keep the frozen denoiser's blocks in the CPU's memory, and bring each to the GPU shortly before it runs",
    )
    activation_offloading: bool = free_option(
        False,
        "keep what `grad_checkpoint` saves of the denoiser in the CPU's memory until the backward pass",
    )
    grad_checkpoint: bool | Literal["keep_attention", "parts"] = option(
        True,
        "recompute activations in the backward pass to save memory; `keep_attention` keeps those of attention, `parts` "
        "recomputes a block's attention and feed-forward network once more, one at a time",
    )

    def base_adapter_contents(self) -> dict[str, list[str]]:
        """What ``base_adapters`` hold, since a path may hold another adapter tomorrow; empty without any."""
        paths = [BaseAdapter.of(entry).path for entry in self.base_adapters]
        return {"content of base_adapters": [file_identity(path) for path in paths]} if paths else {}


@dataclass(frozen=True, kw_only=True)
class FamilySettings:
    """Keys of one model family; a family subclasses it with its own options.

    Attributes:
        nested_flags: flags that set a key inside an entry: name → (entry, key).
        clips_per_video: clips made one after the other.
    """

    nested_flags: ClassVar[Mapping[str, tuple[str, str]]] = {}

    @property
    def clips_per_video(self) -> int:
        return 1


@dataclass(frozen=True)
class Prompt:
    """One prompt as the user wrote it; a family with a grammar of its own subclasses it."""

    text: str

    @property
    def reward_text(self) -> str:
        """What a reward model reads."""
        return self.text

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text the denoiser is conditioned on in some clip of the video."""
        return (self.text,)

    def text_number(self, clip: int) -> int:
        """Which of ``texts`` holds in a clip."""
        return 0

    @property
    def written(self) -> str:
        """The prompt in the notation it was written in."""
        return self.text

    @property
    def identity(self) -> dict[str, str]:
        """What tells it from other prompts in a manifest."""
        return {"prompt": self.written}


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt with the features of each of its ``texts``, on the CPU."""

    prompt: Prompt
    features: tuple[Features, ...]

    def features_of(self, clip: int = 0) -> Features:
        return self.features[self.prompt.text_number(clip)]


class TextEncoder(ABC):
    """Turns captions into features; exists only while captions are encoded."""

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> list[Features]:
        """Named tensors for each caption, on the CPU, trimmed to the caption's own tokens."""


class Conditions(ABC):
    """Given frames of one batch of videos, clip by clip; an optional capability of a family."""

    @abstractmethod
    def condition(
        self, step: DenoisingStep, z: Tensor, clip: int, noise_like: Callable[[Tensor], Tensor]
    ) -> Step:
        """The sampling step that keeps the given frames; puts them into the noise ``z`` [B, C, T, h, w] in place."""

    @abstractmethod
    def join(self, clips: Sequence[Tensor]) -> Tensor:
        """Clips [B, 3, frames, H, W] in [-1, 1], each continuing the one before → one video."""

    @abstractmethod
    def follow(self, clip: Tensor, number: int) -> None:
        """Make clip ``number`` begin with the end of ``clip``, the one before."""


class Backbone(ABC):
    """A text-to-video model family.

    Building one loads nothing. ``text_encoder()`` comes first, so that its memory is free again before
    ``load()`` brings the denoiser and the VAE to the device, frozen.

    Class attributes, which a family states about itself:
        settings_class: its keys of the configuration.
        weights: key of the configuration (dotted inside an entry) → the published weights it defaults to.
        text_weights: those of ``weights`` that only the text encoder needs.
        lora_targets: suffixes of the linear layers adapted by default.
        obeys: optional common keys that have an effect on it; others are refused by name.
        decode_contexts: values of ``decode_context`` that have a meaning for it.
        recomputations: values of ``grad_checkpoint`` that have a meaning for it.
        original_names: the denoiser's layers by their original names, a table of ``Core.modules.lora_names``;
            without one its adapters are neither read nor written as ComfyUI and kohya do.
        diffusers_component: the denoiser's name in diffusers' pipeline, for adapters that diffusers loads.
        experts: names of the denoiser's parts that are denoisers of their own to other programs.
        key_bounds: common keys that have narrower bounds for it.

    Attributes:
        denoiser: the network adapters attach to; set by ``load``, replaced by the adapter's wrapper.
        vae: the network that ``decode`` uses, or None.
        device, dtype: of the frozen networks.
        process: noise levels and deterministic step of the diffusion process.
        negative: features of ``negative_prompt``; set when captions are encoded.
        compiled: whether the denoiser's blocks are compiled.
        mesh: the processes that the denoiser is split over, to be set before ``load``; None where it is whole.
        offload_device: where streamed blocks and offloaded activations wait for the device.
        unfilled: networks whose parameters are on the meta device, with the files that hold them, until ``load`` has
            split them and each process reads its own part.
    """

    settings_class: ClassVar[type[FamilySettings]]
    weights: ClassVar[Mapping[str, Weight]] = {}
    text_weights: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar[tuple[str, ...]] = ()
    obeys: ClassVar[frozenset[str]] = frozenset()
    decode_contexts: ClassVar[tuple[str, ...]] = ("isolated",)
    recomputations: ClassVar[tuple[bool | str, ...]] = (True, False)
    original_names: ClassVar[Mapping[str, str]] = {}
    diffusers_component: ClassVar[str] = ""
    experts: ClassVar[tuple[str, ...]] = ()
    key_bounds: ClassVar[Mapping[str, Bounds]] = {}

    denoiser: nn.Module
    vae: Any = None
    negative: Features | None = None

    def __init__(
        self, settings: FamilySettings, models: ModelSettings, video: VideoSpec, device: torch.device
    ):
        self.settings, self.models, self.video, self.device = settings, models, video, device
        self.dtype = DTYPES[models.dtype]
        self.process: Process = RectifiedFlow()
        self.compiled = False
        self.mesh: Any = None
        self.offload_device = torch.device("cpu")
        self.unfilled: list[tuple[nn.Module, Sequence[Path]]] = []

    # Before anything loads

    @classmethod
    @abstractmethod
    def frame_size(cls, resolution: str, aspect_ratio: str) -> tuple[int, int]:
        """(height, width) in pixels of a named resolution; ValueError names those there are."""

    @classmethod
    @abstractmethod
    def frame_count(cls, num_frames: str | int, fps: float) -> int:
        """Frames of a named duration, or the number itself; ValueError names the durations."""

    @classmethod
    def video_spec(cls, video: VideoSettings) -> VideoSpec:
        """The size that the configuration asks for.

        Raises:
            ValueError: no such resolution, aspect ratio or duration.
        """
        size = video.image_size or cls.frame_size(str(video.resolution), str(video.aspect_ratio))
        return VideoSpec(int(size[0]), int(size[1]), cls.frame_count(video.num_frames, video.fps), video.fps)

    @classmethod
    @abstractmethod
    def count_latent_frames(cls, num_frames: int, settings: Any) -> int:
        """T of a video, from the configuration alone."""

    @classmethod
    @abstractmethod
    def num_sampling_steps(cls, settings: Any) -> int | None:
        """N, or None where the configuration does not say it."""

    @classmethod
    def config_errors(
        cls, settings: Any, models: ModelSettings, video: VideoSettings, training: bool
    ) -> list[str]:
        """What is wrong with the family's keys beyond types and ranges; loads nothing."""
        return []

    @classmethod
    def parse_prompts(cls, texts: Sequence[str], settings: Any = None) -> Sequence[Prompt]:
        """The family's prompt grammar; without ``settings`` that of prompts alone, such as a validation file's.

        Raises:
            ValueError: a prompt that breaks it.
        """
        return [Prompt(text) for text in texts]

    @classmethod
    def prompt_errors(
        cls, prompts: Sequence[Any], settings: Any, video: VideoSettings, training: bool
    ) -> list[str]:
        """What is wrong with the prompts; loads no network."""
        return []

    @classmethod
    def weights_of(cls, settings: FamilySettings) -> dict[str, Weight]:
        """The weights that a configuration names, by key."""
        return {key: weight.at(str(_value_at(settings, key))) for key, weight in cls.weights.items()}

    @classmethod
    def denoiser_shapes(cls, settings: Any) -> Mapping[str, Sequence[int]]:
        """Shape of each of the denoiser's weights by name, as far as files on this machine say; loads nothing."""
        return {}

    @contextmanager
    def loading(self, what: str, keys: Iterable[str]) -> Iterator[None]:
        """Load the weights of ``keys`` in the block; damaged files are named in a sentence.

        Raises:
            ValueError: one is damaged.
        """
        weights = self.weights_of(self.settings)
        sources = [weights[key] for key in keys]
        for place in filter(None, map(present, sources)):
            refuse_damaged(place)
        with loading(what, [weight.source for weight in sources]):
            yield

    def fetch(self, text_encoder: bool = True) -> list[str]:
        """Bring all weights, or all but the text encoder's, to this machine; a sentence for each that cannot be had."""
        errors = []
        for key, weight in self.weights_of(self.settings).items():
            if (key in self.text_weights and not text_encoder) or Path(weight.source).expanduser().exists():
                continue
            try:
                locate(weight)
            except FileNotFoundError as error:
                errors.append(f"{key}: {error}")
        return errors

    # Captions

    @property
    @abstractmethod
    def text_identity(self) -> str:
        """Names weights, tokenizer and length: what cached features depend on besides the caption."""

    def caption(self, text: str) -> str:
        """The text the model is conditioned on, from one of a prompt's ``texts``."""
        return text

    @property
    def negative_caption(self) -> str | None:
        """The caption that guidance leads away from; None where the family has no such caption or uses none."""
        return None

    @abstractmethod
    def text_encoder(self) -> TextEncoder:
        """Load the text encoder."""

    def features(self, encoded: EncodedPrompt, clip: int = 0) -> Features:
        """All that conditions one clip of a prompt's video."""
        return encoded.features_of(clip)

    # Networks

    @abstractmethod
    def load_denoiser(self) -> nn.Module:
        """The denoiser with its weights, on the CPU; runs after ``load_vae``.

        Where there is a ``mesh``, parts of it may be in ``unfilled`` instead.
        """

    def load_vae(self) -> nn.Module | None:
        """The VAE with its weights, on the CPU."""
        return None

    @property
    def blocks(self) -> list[nn.Module]:
        """The denoiser's repeated blocks: they are compiled, split and streamed, and their linear layers quantised."""
        return []

    @property
    def partly_adapted(self) -> bool:
        """Whether an evaluation of the denoiser may reach no adapter, and so no gradient."""
        return False

    @property
    def called_from_outside(self) -> list[sharding.Part]:
        """Modules of the denoiser with a method that is called when neither they nor their block run ``forward``."""
        return []

    def adapter_targets(self, suffixes: Sequence[str]) -> list[str]:
        """What ``lora.attach`` adapts where layers of these name suffixes are asked for."""
        return list(suffixes)

    def load(self) -> None:
        """Bring the VAE and the denoiser to the device, frozen, and store them as ``dtype`` and ``base_quant`` say.

        Base adapters are merged first, so that what is stored in fewer bits is the sum.
        """
        if (vae := self.load_vae()) is not None:
            # An image VAE's activations overflow float16; diffusers, too, computes it in float32 then.
            vae_dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
            self.vae = self._place(vae, vae_dtype, self.device)
            forget_conv_inputs(self.vae)
        self.denoiser = self.load_denoiser()
        if self.mesh is not None:
            parts = [*self.called_from_outside, *((block, "") for block in self.blocks)]
            sharding.shard(self.denoiser, parts, self.mesh)
            self._fill()
        base_adapters.merge(self.denoiser, self.models.base_adapters, self.original_names)
        streamed = self.models.stream_blocks
        self.denoiser = self._place(
            self.denoiser, self.dtype, self.offload_device if streamed else self.device
        )
        if self.models.dtype == "fp8":
            store_linears_in_fp8(self.blocks)
        if self.models.base_quant == "nf4":
            store_linears_in_nf4(self.blocks)
        if streamed:
            self._stream()
            self.denoiser.to(self.device)  # what is in no block

    def _fill(self) -> None:
        """Read this process's part of the networks that have been split without content."""
        for network, files in self.unfilled:
            sharding.fill(network, files, self.device)

    @property
    def _unstreamed(self) -> list[nn.Module]:
        """Parts of blocks that run outside of them."""
        return [module for module, _ in self.called_from_outside if module is not self.denoiser]

    def _stream(self) -> None:
        stream(self.blocks, self.device, self._unstreamed)

    def _place(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return module.to(device, dtype).eval().requires_grad_(False)

    def enable_checkpointing(self, keep_attention: bool = False) -> None:
        """Recompute activations in the backward pass, once, wherever gradients flow.

        Args:
            keep_attention: all but the outputs of the denoiser's attention.
        """
        from diffusers import ModelMixin

        for network in filter(None, (self.denoiser, self.vae)):
            for module in network.modules():
                if isinstance(module, ModelMixin):
                    module.enable_gradient_checkpointing()

    def compile_blocks(self) -> None:
        """Have the denoiser's blocks compiled when they next run."""
        # Past the limit blocks would run uncompiled, without a word: each kind of block, with or without a
        # gradient, of training or validation, is one program.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for block in self.blocks:
            block.compile(dynamic=False)
        self.compiled = True

    # Sampling

    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, h, w) of one video's latent."""

    @abstractmethod
    def timesteps(self, batch: int) -> Tensor:
        """[N, batch], falling from pure noise."""

    @abstractmethod
    def predictor(
        self,
        text: Sequence[Features],
        *,
        guided: bool = True,
        null_grad: bool = True,
        observe: PredictionObserver | None = None,
    ) -> Predict:
        """The model's prediction for a batch of captions, as a function of latent and timesteps.

        Args:
            guided: with classifier-free guidance; False gives the prediction for the captions alone.
            null_grad: whether guidance's unconditional branch keeps a graph where the caption's does.
            observe: sees the captions' own prediction at every step that keeps its graph.
        """

    def inference_step(self, predict: Predict, generators: Sequence[torch.Generator]) -> Any:
        """The sampling step of finished videos, with ``timesteps`` [N, B].

        Args:
            generators: one per video, for a sampler that draws noise.
        """
        return DenoisingStep(predict, self.process, self.timesteps(len(generators)))

    def no_grad_steps(self) -> AbstractContextManager:
        """Context of sampling steps without a gradient, which leave out what is there for one."""
        # The compiler fuses PEFT's layer itself, which needs autocast.
        return nullcontext() if self.compiled else lean_steps(self.denoiser, self.device, self.dtype)

    def conditions(self, prompts: Sequence[Any]) -> Conditions | None:
        """The given frames of these prompts' videos; None where all frames are generated."""
        return None

    # Pixels

    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, frames, H, W] in [-1, 1] → latents [B, C, T, h, w]; of a family that obeys ``pairs``."""
        raise NotImplementedError

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, C, T, h, w] → video [B, 3, frames, H, W], about [-1, 1]."""

    @abstractmethod
    def decode_frames(self, z: Tensor, index: Tensor, context: str = "isolated", reach: int = 1) -> Tensor:
        """Latents and latent frame numbers [B, F] → frames [B, F, 3, H, W], differentiable.

        Args:
            context: what a frame is decoded from: its latent frame alone (``isolated``), or what it depends on in
                the finished video, with a gradient to some of that (``causal``) or to all (``whole``).
            reach: latent frames that the gradient of a ``causal`` frame reaches, its own and those before it.
        """

    def decode_at(self, z: Tensor, frames: Tensor, context: str = "whole", reach: int = 1) -> Tensor:
        """Latents and frame numbers [B, F] of the video → those frames [B, F, 3, H, W], differentiable."""
        rows = torch.arange(len(frames), device=z.device)[:, None]
        return self.decode(z).transpose(1, 2)[rows, frames.to(z.device)]


def _value_at(settings: FamilySettings, key: str) -> Any:
    """The value of a dotted key."""
    name, _, inner = key.partition(".")
    value = getattr(settings, name)
    return value.get(inner) if inner else value


def weight_errors(key: str, source: str | None) -> list[str]:
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
