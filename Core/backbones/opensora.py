"""Open-Sora 1.2, through the public names that upstream's own package has too.

The networks are imported when they are loaded: a configuration is checked without them.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, L text tokens, D text width.
"""

import functools
import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from Core.modules.sharding import Part
from Core.sampling.euler import Predict
from Core.utils.damage import read_settings
from Core.utils.hub import Weight, locate, present
from Core.utils.options import option, video_option
from Core.utils.state_dict import tensor_shapes
from opensora.datasets.aspect import get_image_size, get_num_frames
from opensora.utils.inference_utils import append_score_to_prompts, prepare_multi_resolution_info

from . import opensora_upstream as upstream
from .base import (
    Backbone,
    FamilySettings,
    Features,
    ModelSettings,
    PredictionObserver,
    TextEncoder,
    VideoSettings,
    VideoSpec,
    file_identity,
    gather_frames,
    pad_text,
    weight_errors,
)
from .opensora_conditions import OpenSoraConditions, conditioning_errors
from .opensora_prompts import OpenSoraPrompt, parse_prompts
from .opensora_sampling import guided_velocity, rflow_timesteps

CHUNK_FRAMES, TIME_FACTOR, SPACE_FACTOR = 17, 4, 8
ENTRIES = ("model", "vae", "text_encoder", "scheduler")
WEIGHTS = "from_pretrained"
# Keys of ``model`` that the shapes of its weights follow from.
SHAPING = (
    *("in_channels", "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "pred_sigma"),
    *("caption_channels", "model_max_length", "qk_norm"),
)


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """Keys of ``model``; those beside its weights override the sizes in the weights' ``config.json``."""

    type: Literal["STDiT3-XL/2", "STDiT3-3B/2"] = option("STDiT3-XL/2", "size of the denoiser")
    from_pretrained: str | None = option(None, "hub id or local path of the weights", path=True)
    force_huggingface: bool = option(False, "upstream's name for a hub id; has no effect here")
    enable_sequence_parallelism: Literal[False] = option(False, "upstream's key; must be False")
    enable_flash_attn: bool = option(False, "upstream's key; PyTorch picks the kernel")
    enable_layernorm_kernel: bool = option(False, "upstream's key; PyTorch picks the kernel")
    input_size: list[int | None] = option([None, None, None], "upstream's key", minimum=1)
    input_sq_size: int = option(
        512, "side in pixels at which positions are not scaled", minimum=1, maximum=1 << 16
    )
    in_channels: int = option(4, "latent channels", minimum=1, maximum=1 << 12)
    patch_size: tuple[int, int, int] = option(
        (1, 2, 2), "latent frames, rows and columns of a token", minimum=1, maximum=64
    )
    hidden_size: int = option(1152, "width", minimum=1, maximum=1 << 16)
    depth: int = option(28, "pairs of blocks", minimum=1, maximum=1 << 10)
    num_heads: int = option(16, "attention heads", minimum=1, maximum=1 << 10)
    mlp_ratio: float = option(4.0, "width of the MLP relative to hidden_size", above=0, maximum=64)
    class_dropout_prob: float = option(0.1, "used in pretraining alone", minimum=0, maximum=1)
    pred_sigma: bool = option(True, "whether the output has twice the channels")
    caption_channels: int = option(4096, "width of the text features", minimum=1, maximum=1 << 16)
    model_max_length: int = option(300, "text tokens", minimum=1, maximum=1 << 16)
    qk_norm: bool = option(True, "normalise queries and keys")


@dataclass(frozen=True, kw_only=True)
class VaeEntry:
    """Keys of ``vae``."""

    type: Literal["OpenSoraVAE_V1_2"] = option("OpenSoraVAE_V1_2", "kind of VAE")
    from_pretrained: str | None = option(None, "hub id or local path of the weights", path=True)
    micro_frame_size: int | None = option(CHUNK_FRAMES, "frames coded together", minimum=1, maximum=1 << 16)
    micro_batch_size: int | None = option(
        4, "frames of the image VAE's forward pass", minimum=1, maximum=1 << 16
    )
    local_files_only: bool = option(False, "never use the network")
    freeze_vae_2d: bool = option(False, "upstream's key; the VAE is always frozen here")
    cal_loss: Literal[False] = option(False, "upstream's key of VAE training; must be False")
    force_huggingface: bool = option(False, "upstream's name for a hub id; has no effect here")


@dataclass(frozen=True, kw_only=True)
class TextEncoderEntry:
    """Keys of ``text_encoder``."""

    type: Literal["t5"] = option("t5", "kind of text encoder")
    from_pretrained: str | None = option(
        None, "hub id or local path of the weights and the tokenizer", path=True
    )
    model_max_length: int = option(300, "tokens per caption", minimum=1, maximum=1 << 16)
    cache_dir: str | None = option(None, "download folder in place of the hub's cache", path=True)
    shardformer: Literal[False] = option(False, "upstream's key for colossalai's layers; must be False")
    local_files_only: bool = option(False, "never use the network")


@dataclass(frozen=True, kw_only=True)
class SchedulerEntry:
    """Keys of ``scheduler``."""

    type: Literal["rflow"] = option("rflow", "kind of sampler")
    num_sampling_steps: int = option(30, "Euler steps of a video", minimum=1, maximum=1000)
    cfg_scale: float = option(7.0, "classifier-free guidance scale", minimum=0, maximum=1000)
    use_timestep_transform: bool = option(False, "shift timesteps by resolution and length")
    use_discrete_timesteps: bool = option(False, "round timesteps to whole numbers")


@dataclass(frozen=True, kw_only=True)
class OpenSoraSettings(FamilySettings):
    """Keys of Open-Sora 1.2."""

    nested_flags: ClassVar = {
        "ckpt_path": ("model", WEIGHTS),
        "num_sampling_steps": ("scheduler", "num_sampling_steps"),
        "cfg_scale": ("scheduler", "cfg_scale"),
    }

    model: dict = video_option({}, "denoiser entry", entry=ModelEntry)
    vae: dict = video_option({}, "VAE entry", entry=VaeEntry)
    text_encoder: dict = video_option({}, "text encoder entry", entry=TextEncoderEntry)
    scheduler: dict = video_option(
        {}, "sampler entry: num_sampling_steps, cfg_scale, use_timestep_transform", entry=SchedulerEntry
    )
    multi_resolution: str | None = video_option(
        "STDiT2", "kind of size conditioning the weights were trained with"
    )
    aes: float | None = video_option(6.5, "aesthetic score to condition on", minimum=0, maximum=100)
    flow: float | None = video_option(None, "motion score to condition on", minimum=0, maximum=1000)
    camera_motion: str | None = video_option(None, "camera motion to condition on, such as `pan left`")
    reference_path: list[str] | None = option(
        None, "per prompt: pictures or videos to condition on, separated by `;`", empty=True
    )
    mask_strategy: list[str] | None = option(
        None, "per prompt: which reference frames to keep, and where", empty=True
    )
    loop: int = video_option(1, "clips per video, each continuing the one before", minimum=1, maximum=1 << 10)
    condition_frame_length: int = video_option(
        5, "latent frames a clip takes over from the one before", minimum=1, maximum=1 << 16
    )
    condition_frame_edit: float = video_option(
        0.0, "how far the frames taken over may change, 0 to 1", minimum=0, maximum=1
    )
    align: int | None = video_option(
        5, "positions of given frames are rounded to this many latent frames", minimum=1, maximum=1 << 16
    )

    @property
    def clips_per_video(self) -> int:
        return self.loop

    @property
    def scores(self) -> dict[str, Any]:
        return {"aes": self.aes, "flow": self.flow, "camera_motion": self.camera_motion}


# Kinds of size conditioning that give an STDiT3 what it asks for; the second is upstream's other name for it.
MULTI_RESOLUTION = ("STDiT2", "OpenSora")


class OpenSoraText(TextEncoder):
    """T5 features of captions: ``features`` [L, D]."""

    def __init__(self, entry: dict, device: torch.device, dtype: torch.dtype):
        from opensora.registry import MODELS, build_module

        self.t5 = build_module(entry, MODELS, device=device, dtype=dtype)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Features]:
        out = self.t5.encode(list(captions))
        pairs = zip(out["y"].cpu(), out["mask"].cpu(), strict=True)
        return [{"features": y[0, m != 0]} for y, m in pairs]


class OpenSora(Backbone):
    """Open-Sora 1.2: STDiT3, its video VAE and a T5 encoder."""

    settings_class = OpenSoraSettings
    weights = {
        "model.from_pretrained": Weight(
            source="hpcai-tech/OpenSora-STDiT-v3", size=4_835_000_000, licence="Apache-2.0"
        ),
        "vae.from_pretrained": Weight(
            source="hpcai-tech/OpenSora-VAE-v1.2", size=1_573_000_000, licence="Apache-2.0"
        ),
        "text_encoder.from_pretrained": Weight(
            source="DeepFloyd/t5-v1_1-xxl", parts=("tokenizer",), size=19_050_000_000, licence="Apache-2.0"
        ),
    }
    text_weights = ("text_encoder.from_pretrained",)
    lora_targets = ("qkv", "q_linear", "kv_linear")
    obeys = frozenset(
        ["dtype", "base_quant", "text_encoding", "compile_blocks", "grad_checkpoint"]
        + ["guidance_grad", "decode_context", "pairs", "shard_frozen", "stream_blocks"]
        + ["activation_offloading"]
    )
    decode_contexts = ("isolated", "causal")
    recomputations = (True, False, "keep_attention", "parts")

    settings: OpenSoraSettings

    def __init__(
        self, settings: OpenSoraSettings, models: ModelSettings, video: VideoSpec, device: torch.device
    ):
        super().__init__(settings, models, video, device)
        self.checkpointing = False

    @classmethod
    def frame_size(cls, resolution: str, aspect_ratio: str) -> tuple[int, int]:
        try:
            return get_image_size(resolution, aspect_ratio)
        except (AssertionError, KeyError) as error:  # upstream's
            raise ValueError(
                f"resolution {resolution!r} with aspect_ratio {aspect_ratio!r}: {error}"
            ) from error

    @classmethod
    def frame_count(cls, num_frames: str | int, fps: float) -> int:
        return get_num_frames(num_frames)

    @classmethod
    def count_latent_frames(cls, num_frames: int, settings: OpenSoraSettings) -> int:
        chunk = settings.vae.get("micro_frame_size", CHUNK_FRAMES) or num_frames
        whole, rest = divmod(num_frames, chunk)
        return whole * -(-chunk // TIME_FACTOR) + -(-rest // TIME_FACTOR)

    @classmethod
    def num_sampling_steps(cls, settings: OpenSoraSettings) -> int | None:
        return settings.scheduler.get("num_sampling_steps")

    @classmethod
    def config_errors(
        cls, settings: OpenSoraSettings, models: ModelSettings, video: VideoSettings, training: bool
    ) -> list[str]:
        missing = [key for key in ENTRIES if "type" not in getattr(settings, key)]
        if missing:
            return [f"{key} must be an entry with a type, such as {key} = dict(type=…)" for key in missing]
        errors = []
        for key in ("model", "vae", "text_encoder"):
            errors += weight_errors(f"{key}.{WEIGHTS}", getattr(settings, key).get(WEIGHTS))
        if "model_max_length" not in settings.text_encoder:
            errors.append("text_encoder.model_max_length is missing; Open-Sora 1.2 uses 300")
        errors += [
            f"scheduler.{key} is missing; set it to a number"
            for key in ("num_sampling_steps", "cfg_scale")
            if settings.scheduler.get(key) is None
        ]
        if video.image_size and min(video.image_size) < SPACE_FACTOR:
            errors.append(
                f"image_size must be at least {SPACE_FACTOR} pixels each way, which are one of the latent, "
                f"got {tuple(video.image_size)}"
            )
        if settings.multi_resolution not in MULTI_RESOLUTION:
            errors.append(
                f"multi_resolution must be {' or '.join(map(repr, MULTI_RESOLUTION))}, which tell the denoiser the "
                f"size of the video, got {settings.multi_resolution!r}"
            )
        errors += _architecture_errors(settings)
        errors += _length_errors(settings, video) + _package_errors(models, training)
        return errors + (_training_errors(settings) if training else cls._loop_errors(settings, video))

    @classmethod
    def _loop_errors(cls, settings: OpenSoraSettings, video: VideoSettings) -> list[str]:
        """Whether a clip can take over ``condition_frame_length`` latent frames and still make some of its own."""
        try:
            count = cls.count_latent_frames(cls.frame_count(video.num_frames, video.fps), settings)
        except ValueError:
            return []  # said of num_frames itself
        if settings.loop == 1 or settings.condition_frame_length < count:
            return []
        return [
            f"loop={settings.loop} needs clips longer than what they take over: condition_frame_length is "
            f"{settings.condition_frame_length} and a clip has {count} latent frames; lower condition_frame_length "
            "or raise num_frames"
        ]

    @classmethod
    def parse_prompts(
        cls, texts: Sequence[str], settings: OpenSoraSettings | None = None
    ) -> list[OpenSoraPrompt]:
        if settings is None:
            return parse_prompts(texts)
        return parse_prompts(texts, settings.reference_path, settings.mask_strategy)

    @classmethod
    def prompt_errors(
        cls,
        prompts: Sequence[OpenSoraPrompt],
        settings: OpenSoraSettings,
        video: VideoSettings,
        training: bool,
    ) -> list[str]:
        if training:
            # Training generates every frame; a prompt that conditions on a file has no place in it.
            given = [prompt.text for prompt in prompts if prompt.reference or prompt.mask_strategy]
            sentence = "training prompts cannot have references: {!r}; remove their JSON suffix"
            return [sentence.format(given[0])] if given else []
        count = functools.partial(cls.count_latent_frames, settings=settings)
        return conditioning_errors(
            prompts,
            loops=settings.loop,
            align=settings.align,
            clip_latents=count(cls.frame_count(video.num_frames, video.fps)),
            count_latents=count,
        )

    @classmethod
    def denoiser_shapes(cls, settings: OpenSoraSettings) -> Mapping[str, Sequence[int]]:
        found = present(cls.weights_of(settings)["model.from_pretrained"])
        return tensor_shapes(found) if found else {}

    def fetch(self, text_encoder: bool = True) -> list[str]:
        errors = super().fetch(text_encoder)
        if upstream.is_upstream():
            weights = self.weights_of(self.settings)
            loaded = [weight for key, weight in weights.items() if key not in self.text_weights]
            errors += upstream.errors(loaded)
        return errors

    def caption(self, text: str) -> str:
        from opensora.models.text_encoder.t5 import text_preprocessing

        return text_preprocessing(append_score_to_prompts([text], **self.settings.scores)[0])

    @property
    def text_identity(self) -> str:
        entry, encoding = self.settings.text_encoder, self.models.text_encoding
        identity = f"{file_identity(entry[WEIGHTS])} {entry['model_max_length']} {self.dtype}"
        return identity if encoding == "device" else f"{identity} {encoding}"

    def text_encoder(self) -> TextEncoder:
        # As a folder, since transformers asks the network about a hub id that is all here.
        folder = locate(self.weights_of(self.settings)["text_encoder.from_pretrained"])
        upstream.admit(folder)
        entry = {**self.settings.text_encoder, WEIGHTS: str(folder)}
        if self.models.text_encoding == "8bit":
            entry["load_in_8bit"] = True
        device = torch.device("cpu") if self.models.text_encoding == "cpu" else self.device
        return OpenSoraText(entry, device, self.dtype)

    def load_vae(self) -> nn.Module:
        from opensora import models as _models  # noqa: F401 (registers the networks)
        from opensora.registry import MODELS, build_module

        if upstream.is_upstream():
            return upstream.load_vae(self.settings.vae, self.weights_of(self.settings)["vae.from_pretrained"])
        return build_module(self._pinned("vae"), MODELS)

    def load_denoiser(self) -> nn.Module:
        from opensora.registry import MODELS, build_module

        entry = self.settings.model
        sizes = {
            "input_size": self.latent_shape()[1:],
            "in_channels": self.vae.out_channels,
            "model_max_length": self.settings.text_encoder["model_max_length"],
        }
        if upstream.is_upstream():
            weight = self.weights_of(self.settings)["model.from_pretrained"]
            return upstream.load_denoiser(entry, weight, **sizes)
        return build_module(self._pinned("model"), MODELS, **sizes)

    def _pinned(self, name: str) -> dict[str, Any]:
        """An entry whose hub id names a revision, which the networks do not know, with the folder in its place."""
        entry = getattr(self.settings, name)
        weight = self.weights_of(self.settings).get(f"{name}.{WEIGHTS}")
        if weight is None or weight.is_local or "@" not in weight.source:
            return entry
        return {**entry, WEIGHTS: str(locate(weight))}

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.denoiser.spatial_blocks, *self.denoiser.temporal_blocks]

    @property
    def called_from_outside(self) -> list[Part]:
        if not getattr(self.denoiser, "accepts_text_context", False):
            return []
        return [*((block.cross_attn, "keys_values") for block in self.blocks), (self.denoiser, "encode_text")]

    def latent_shape(self) -> tuple[int, int, int, int]:
        size = (self.video.num_frames, self.video.height, self.video.width)
        return (self.vae.out_channels, *self.vae.get_latent_size(size))

    def timesteps(self, batch: int) -> Tensor:
        scheduler = self.settings.scheduler
        return rflow_timesteps(
            scheduler["num_sampling_steps"],
            batch,
            self._info(batch) if scheduler.get("use_timestep_transform") else None,
            num_timesteps=self.process.num_timesteps,
            discrete=scheduler.get("use_discrete_timesteps", False),
        ).to(self.device)

    def _info(self, batch: int) -> dict[str, Tensor]:
        size = (self.video.height, self.video.width)
        return prepare_multi_resolution_info(
            self.settings.multi_resolution,
            batch,
            size,
            self.video.num_frames,
            self.video.fps,
            "cpu",
            torch.float32,
        )

    def predictor(
        self,
        text: Sequence[Features],
        *,
        guided: bool = True,
        null_grad: bool = True,
        observe: PredictionObserver | None = None,
    ) -> Predict:
        features, mask = pad_text([caption["features"] for caption in text], self.device)
        null = self.denoiser.y_embedder.y_embedding[: features.shape[1]].to(features)
        info = self._info(len(text))
        info |= {key: info[key].to(self.device) for key in info if key not in ("height", "width")}
        return guided_velocity(
            self.denoiser,
            features[:, None],
            null.expand(len(text), 1, -1, -1),
            mask,
            info,
            guidance_scale=self.settings.scheduler["cfg_scale"] if guided else 1,
            null_grad=null_grad,
            observe=observe,
        )

    def conditions(self, prompts: Sequence[OpenSoraPrompt]) -> OpenSoraConditions | None:
        settings = self.settings
        given = any(prompt.reference or prompt.mask_strategy for prompt in prompts)
        if not given and settings.loop == 1:
            return None
        return OpenSoraConditions(
            self.vae,
            prompts,
            image_size=(self.video.height, self.video.width),
            align=settings.align,
            length=settings.condition_frame_length,
            overlap=self.overlap(settings.condition_frame_length),
            edit=settings.condition_frame_edit,
        )

    def encode(self, video: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):  # which would overflow in float16
            z = self.vae.encode(video.to(self.device, self.vae.dtype))
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def decode(self, z: Tensor) -> Tensor:
        return self._decode(z, self.video.num_frames)

    def decode_frames(self, z: Tensor, index: Tensor, context: str = "isolated", reach: int = 1) -> Tensor:
        if context == "causal":
            return self._in_vae_dtype(z, lambda z: self._decode_in_chunks(z, index)).unflatten(0, index.shape)
        return self._decode(gather_frames(z, index), 1).squeeze(2).unflatten(0, index.shape)

    def _decode(self, z: Tensor, num_frames: int) -> Tensor:
        return self._in_vae_dtype(z, lambda z: self.vae.decode(z, num_frames=num_frames))

    def _decode_in_chunks(self, z: Tensor, index: Tensor) -> Tensor:
        """[B·F, 3, H, W]: of each latent frame's four video frames the last, which is what it makes when alone.

        The temporal half decodes whole chunks, since its norms look at all of one; the image half the chosen
        frames alone.
        """
        chunk = self.vae.micro_frame_size or self.video.num_frames
        latents = -(-chunk // TIME_FACTOR)
        z = z * self.vae.scale.to(z.dtype) + self.vae.shift.to(z.dtype)
        chunks: dict[tuple[int, int], Tensor] = {}
        chosen = []
        for video, row in enumerate(index.tolist()):
            for number, place in (divmod(frame, latents) for frame in row):
                frames = min(chunk, self.video.num_frames - number * chunk)
                if (video, number) not in chunks:
                    part = z[video : video + 1, :, number * latents : (number + 1) * latents]
                    chunks[video, number] = self._decode_time(part, frames)
                last = place * TIME_FACTOR + TIME_FACTOR - 1 - -frames % TIME_FACTOR
                chosen.append(chunks[video, number][:, :, last : last + 1])
        return self.vae.spatial_vae.decode(torch.cat(chosen)).squeeze(2)

    def _decode_time(self, z: Tensor, num_frames: int) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.vae.temporal_vae.decode, z, num_frames, use_reentrant=False)
        return self.vae.temporal_vae.decode(z, num_frames)

    def _in_vae_dtype(self, z: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """Pixels in the dtype of ``z``; under an autocast to float16 in the VAE's own, as it would overflow."""
        kind = z.device.type
        wanted = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != torch.float16
        with torch.autocast(kind, enabled=wanted):
            return decode(z.to(self.vae.dtype)).to(z.dtype)

    def compile_blocks(self) -> None:
        # The turn of rotary positions is one operation of its own, compiled or not.
        warnings.filterwarnings(
            "ignore", message="Torchinductor does not support code generation for complex"
        )
        super().compile_blocks()

    def enable_checkpointing(self, keep_attention: bool = False) -> None:
        from opensora.acceleration.checkpoint import set_grad_checkpoint

        self.checkpointing = True
        set_grad_checkpoint(self.denoiser, **({"keep_attention": True} if keep_attention else {}))
        # opensora's switch does not reach the image VAE, which is diffusers' and holds most of a decoded frame.
        super().enable_checkpointing()
        # Upstream checkpoints reentrantly, which loses the adapter's gradient in blocks whose input has none.
        self.denoiser.x_embedder.register_forward_hook(_require_grad)

    def overlap(self, latent_frames: int) -> int:
        """Pixel frames that the first ``latent_frames`` latent frames of a clip make."""
        frames = self.video.num_frames
        chunk = min(self.settings.vae.get("micro_frame_size", CHUNK_FRAMES) or frames, frames)
        whole, rest = divmod(latent_frames, -(-chunk // TIME_FACTOR))
        # A chunk is padded in front to whole latent frames; its first one holds so many pixel frames fewer.
        return whole * chunk + max(0, rest * TIME_FACTOR - -chunk % TIME_FACTOR)


def _require_grad(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Forward hook: where a graph is kept, the output is part of it."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def _training_errors(settings: OpenSoraSettings) -> list[str]:
    single = {"loop": 1, "reference_path": None, "mask_strategy": None}
    return [
        f"{key} is for inference; remove it or set is_vader_training=False"
        for key, value in single.items()
        if getattr(settings, key) != value
    ]


def _architecture_errors(settings: OpenSoraSettings) -> list[str]:
    """Sizes that the weights do not have, where a ``config.json`` on this machine tells."""
    found = present(Weight(source=str(settings.model.get(WEIGHTS))))
    if found is None or not (found / "config.json").is_file():
        return []
    try:
        own = read_settings(found / "config.json")
    except ValueError as error:
        return [f"model.{WEIGHTS}: {error}"]
    given = {f"model.{key}": (settings.model[key], own.get(key)) for key in SHAPING if key in settings.model}
    length = settings.text_encoder.get("model_max_length")
    given["text_encoder.model_max_length"] = (length, own.get("model_max_length"))
    return [
        f"{key} is {value!r}, but the weights in {str(found)!r} have {had!r}; set that"
        for key, (value, had) in given.items()
        if None not in (value, had) and json.dumps(value) != json.dumps(had) and value != had
    ]


def _package_errors(models: ModelSettings, training: bool) -> list[str]:
    """What is asked for, and not in upstream's own opensora package where that is in use."""
    from opensora.acceleration.checkpoint import set_grad_checkpoint

    asked: dict[str, tuple[Any, str]] = {}
    if training and models.grad_checkpoint == "keep_attention":
        asked["grad_checkpoint='keep_attention'"] = (set_grad_checkpoint, "keep_attention")
    if models.text_encoding == "8bit":
        from opensora.models.text_encoder.t5 import T5Encoder

        asked["text_encoding='8bit'"] = (T5Encoder, "load_in_8bit")
    return [
        f"{setting} is not in upstream's opensora package; choose another value"
        for setting, (function, parameter) in asked.items()
        if parameter not in inspect.signature(function).parameters
    ]


def _length_errors(settings: OpenSoraSettings, video: VideoSettings) -> list[str]:
    """The timestep transform counts whole chunks: without one it divides zero by zero."""
    try:
        frames = get_num_frames(video.num_frames)
    except ValueError:
        return []  # said of num_frames itself
    if not settings.scheduler.get("use_timestep_transform") or frames == 1 or frames >= CHUNK_FRAMES:
        return []
    return [
        f"num_frames={video.num_frames!r} is too short for scheduler.use_timestep_transform, which counts chunks of "
        f"{CHUNK_FRAMES} frames; use at least {CHUNK_FRAMES}, 1 for an image, or use_timestep_transform=False"
    ]
