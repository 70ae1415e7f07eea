"""Open-Sora 1.2, through the public names that upstream's own package has too.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, L text tokens, D text width.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from Core.modules.frozen_conv import forget_conv_inputs
from Core.modules.quantization import store_linears_in_fp8, store_linears_in_nf4
from Core.utils.hub import Weight, locate
from Core.utils.options import unknown_key
from opensora import models as _models  # noqa: F401 (registers the networks)
from opensora.acceleration.checkpoint import set_grad_checkpoint
from opensora.datasets.aspect import get_image_size, get_num_frames
from opensora.models.stdit.stdit3 import STDiT3Config
from opensora.models.text_encoder.t5 import text_preprocessing
from opensora.registry import MODELS, build_module
from opensora.schedulers.rf.rectified_flow import timestep_transform
from opensora.utils.inference_utils import (
    append_generated,
    append_score_to_prompts,
    apply_mask_strategy,
    collect_references_batch,
    prepare_multi_resolution_info,
)

from .base import (
    Backbone,
    TextEncoder,
    VelocityObserver,
    VideoSpec,
    check_weights,
    file_identity,
    gather_frames,
    pad_text,
)
from .opensora_conditions import conditioning_errors

CHUNK_FRAMES, TIME_FACTOR, SPACE_FACTOR = 17, 4, 8
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}
# The networks this family is made of; the registry holds their parts, too.
NETWORKS = {
    "model": ("STDiT3-XL/2", "STDiT3-3B/2"),
    "vae": ("OpenSoraVAE_V1_2",),
    "text_encoder": ("t5",),
}
# Kinds of size conditioning that give an STDiT3 what it asks for; the second is upstream's other name for it.
MULTI_RESOLUTION = ("STDiT2", "OpenSora")
COUNTS = ("micro_frame_size", "micro_batch_size", "model_max_length")
SCHEDULER_KEYS: dict[str, Any] = {
    "type": str,
    "num_sampling_steps": int,
    "cfg_scale": (int, float),
    "use_timestep_transform": bool,
    "use_discrete_timesteps": bool,
}


def rflow_timesteps(
    steps: int,
    batch: int,
    info: dict[str, Tensor] | None,
    *,
    num_timesteps: int = 1000,
    discrete: bool = False,
) -> Tensor:
    """[steps, batch] from ``num_timesteps`` down, shifted by ``info`` (height, width, num_frames) if given."""
    t = torch.tensor([(1.0 - i / steps) * num_timesteps for i in range(steps)])
    t = (t.round() if discrete else t)[:, None].expand(steps, batch)
    if info is None:
        return t
    info = {key: value.cpu() for key, value in info.items()}
    return torch.stack([timestep_transform(row, info, num_timesteps=num_timesteps) for row in t])


class Branch:
    """Velocity of a model for one batch of text features, whose keys and values are computed once.

    Args:
        y: text features [B, 1, L, D]; mask [B or fewer, L].
        info: multi-resolution info, each entry [B]. Height and width stay on the CPU, where reading them
            costs no synchronisation.
        checkpoint_steps: recompute a whole gradient step in the backward pass.
    """

    def __init__(
        self, model: nn.Module, y: Tensor, mask: Tensor, info: dict[str, Tensor], checkpoint_steps: bool
    ):
        self.model, self.y, self.mask = model, y, mask
        self.info = info | {key: info[key].cpu() for key in ("height", "width") if key in info}
        self.checkpoint_steps = checkpoint_steps
        self.contexts: dict[bool, dict[str, Any]] = {}

    def text_arguments(self) -> dict[str, Any]:
        """Text keys and values, computed once without and once with a graph, where the model offers it."""
        text = {"y": self.y, "mask": self.mask}
        if not getattr(self.model, "accepts_text_context", False):
            return text
        graph = torch.is_grad_enabled()
        if graph not in self.contexts:
            self.contexts[graph] = {"y": self.model.encode_text(**text)}
        return self.contexts[graph]

    def __call__(self, z: Tensor, t: Tensor, generated: Tensor | None = None) -> Tensor:
        kwargs = {**self.text_arguments(), **self.info}
        if generated is not None:
            kwargs["x_mask"] = generated
        if self.checkpoint_steps and torch.is_grad_enabled():
            out = checkpoint(self.model, z, t, use_reentrant=False, **kwargs)
        else:
            out = self.model(z, t, **kwargs)
        return out[:, : z.shape[1]]


def guided_velocity(
    model: nn.Module,
    y: Tensor,
    y_null: Tensor,
    mask: Tensor,
    info: dict[str, Tensor],
    *,
    guidance_scale: float,
    checkpoint_steps: bool = False,
    null_grad: bool = True,
    observe: VelocityObserver | None = None,
) -> Callable[..., Tensor]:
    """v_null + scale · (v_text − v_null), both branches in one batch; the text branch alone at scale 1.

    Args:
        y, y_null: text features [B, 1, L, D]; mask [B, L].
        info, checkpoint_steps: see ``Branch``.
        null_grad: False leaves the null branch out of the graph: it runs by itself, without one.
        observe: called with the text branch's velocity at every step that keeps its graph.
    """
    text = Branch(model, y, mask, info, checkpoint_steps)
    null = Branch(model, y_null, mask, info, checkpoint_steps)
    doubled = {key: value.repeat(2) for key, value in info.items()}
    both = Branch(model, torch.cat([y, y_null]), mask, doubled, checkpoint_steps)

    def branches(z: Tensor, t: Tensor, generated: Tensor | None) -> tuple[Tensor, Tensor]:
        if guidance_scale == 1:
            v_text = text(z, t, generated)
            return v_text, v_text
        if torch.is_grad_enabled() and not null_grad:
            v_text = text(z, t, generated)
            with torch.no_grad():
                return v_text, null(z, t, generated)
        frames = None if generated is None else generated.repeat(2, 1)
        return both(z.repeat(2, 1, 1, 1, 1), t.repeat(2), frames).chunk(2)

    def velocity(z: Tensor, t: Tensor, generated: Tensor | None = None) -> Tensor:
        v_text, v_null = branches(z, t, generated)
        if observe and torch.is_grad_enabled():
            observe(z, t, v_text)
        return v_text if guidance_scale == 1 else v_null + guidance_scale * (v_text - v_null)

    return velocity


class OpenSoraText(TextEncoder):
    """T5 features of captions."""

    def __init__(self, entry: dict, device: torch.device, dtype: torch.dtype):
        self.t5 = build_module(entry, MODELS, device=device, dtype=dtype)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        out = self.t5.encode(list(captions))
        return [y[0, m != 0] for y, m in zip(out["y"].cpu(), out["mask"].cpu(), strict=True)]


class OpenSora(Backbone):
    """Open-Sora 1.2: STDiT3, its video VAE and a T5 encoder.

    Args:
        model, vae, text_encoder, scheduler: the entries of the config file.
        video: what to make.
        multi_resolution: kind of size conditioning, ``STDiT2`` for the released weights.
        scores: ``aes``, ``flow``, ``camera_motion`` suffixes of every caption.
        dtype: of the frozen weights; ``fp8`` stores the denoiser's linear layers in 8-bit float.
        decode_context: what a scored frame is decoded from: its latent frame alone (``isolated``), or all of the
            chunk it belongs to (``causal``), as in the finished video.
        base_quant: ``nf4`` stores the denoiser's linear layers in 4 bits.
        text_encoding: where and how captions are encoded: on the ``device``, there in ``8bit``, or on the ``cpu``.
    """

    lora_targets = ("qkv", "q_linear", "kv_linear")

    def __init__(
        self,
        *,
        model: dict,
        vae: dict,
        text_encoder: dict,
        scheduler: dict,
        video: VideoSpec,
        multi_resolution: str | None,
        scores: dict[str, Any],
        dtype: str,
        device: torch.device,
        decode_context: str = "isolated",
        base_quant: str = "none",
        text_encoding: str = "device",
    ):
        self.entries = {"model": model, "vae": vae, "text_encoder": text_encoder}
        self.video = video
        self.multi_resolution = multi_resolution
        self.scores = scores
        self.device, self.dtype = device, DTYPES[dtype]
        self.fp8_storage, self.nf4_storage = dtype == "fp8", base_quant == "nf4"
        self.decode_context, self.checkpointing = decode_context, False
        self.text_encoding = text_encoding
        self.num_sampling_steps = scheduler["num_sampling_steps"]
        self.guidance_scale = scheduler["cfg_scale"]
        self.transform = scheduler.get("use_timestep_transform", False)
        self.discrete = scheduler.get("use_discrete_timesteps", False)

    @classmethod
    def frame_size(cls, resolution: str, aspect_ratio: str) -> tuple[int, int]:
        try:
            return get_image_size(resolution, aspect_ratio)
        except (AssertionError, KeyError) as error:  # upstream's
            raise ValueError(
                f"resolution {resolution!r} with aspect_ratio {aspect_ratio!r}: {error}"
            ) from error

    @classmethod
    def frame_count(cls, num_frames: str | int) -> int:
        return get_num_frames(num_frames)

    @classmethod
    def count_latent_frames(cls, num_frames: int, vae: dict) -> int:
        if errors := _count_errors("vae", vae):
            raise ValueError(errors[0])
        chunk = vae.get("micro_frame_size", CHUNK_FRAMES) or num_frames
        whole, rest = divmod(num_frames, chunk)
        return whole * -(-chunk // TIME_FACTOR) + -(-rest // TIME_FACTOR)

    @classmethod
    def config_errors(cls, config) -> list[str]:
        errors = []
        for key in NETWORKS:
            entry = getattr(config, key)
            errors += _entry_errors(key, entry)
            errors += check_weights(f"{key}.from_pretrained", entry.get("from_pretrained"))
        if "model_max_length" not in config.text_encoder:
            errors.append("text_encoder.model_max_length is missing; Open-Sora 1.2 uses 300")
        if config.image_size and min(config.image_size) < SPACE_FACTOR:
            errors.append(
                f"image_size must be at least {SPACE_FACTOR} pixels each way, which are one of the latent, "
                f"got {tuple(config.image_size)}"
            )
        if config.multi_resolution not in MULTI_RESOLUTION:
            errors.append(
                f"multi_resolution must be {' or '.join(map(repr, MULTI_RESOLUTION))}, which tell the denoiser the "
                f"size of the video, got {config.multi_resolution!r}"
            )
        return errors + _scheduler_errors(config.scheduler) + _length_errors(config) + _package_errors(config)

    @classmethod
    def prompt_errors(cls, config, prompts: Sequence) -> list[str]:
        count = functools.partial(cls.count_latent_frames, vae=config.vae)
        return conditioning_errors(
            prompts,
            loops=config.loop,
            align=config.align,
            clip_latents=count(config.video.num_frames),
            count_latents=count,
        )

    @classmethod
    def from_config(cls, config, device: torch.device) -> "OpenSora":
        keys = ["model", "vae", "text_encoder", "scheduler", "video", "multi_resolution", "scores", "dtype"]
        keys += ["decode_context", "base_quant", "text_encoding"]
        return cls(**{key: getattr(config, key) for key in keys}, device=device)

    def caption(self, prompt: str) -> str:
        return text_preprocessing(append_score_to_prompts([prompt], **self.scores)[0])

    @property
    def text_identity(self) -> str:
        entry = self.entries["text_encoder"]
        identity = f"{file_identity(entry['from_pretrained'])} {entry['model_max_length']} {self.dtype}"
        return identity if self.text_encoding == "device" else f"{identity} {self.text_encoding}"

    def text_encoder(self) -> OpenSoraText:
        entry = self.entries["text_encoder"]
        # As a folder, since transformers asks the network about a hub id that is all here.
        folder = locate(self._weight("text_encoder"))
        entry = {**entry, "from_pretrained": str(folder)}
        if self.text_encoding == "8bit":
            entry["load_in_8bit"] = True
        device = torch.device("cpu") if self.text_encoding == "cpu" else self.device
        return OpenSoraText(entry, device, self.dtype)

    def fetch(self, text_encoder: bool = True) -> list[str]:
        errors = []
        for key, entry in self.entries.items():
            if key == "text_encoder" and not text_encoder:
                continue
            if Path(entry["from_pretrained"]).expanduser().exists():
                continue
            try:
                locate(self._weight(key))
            except FileNotFoundError as error:
                errors.append(f"{key}: {error}")
        return errors

    def _weight(self, key: str) -> Weight:
        parts: tuple[Literal["tokenizer"], ...] = ("tokenizer",) if key == "text_encoder" else ()
        return Weight(source=str(self.entries[key]["from_pretrained"]), parts=parts)

    def load(self) -> None:
        # The image VAE's activations overflow float16; diffusers, too, computes it in float32 then.
        vae_dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        self.vae = self._place(build_module(self.entries["vae"], MODELS), vae_dtype)
        forget_conv_inputs(self.vae)
        denoiser = build_module(
            self.entries["model"],
            MODELS,
            input_size=self.latent_shape()[1:],
            in_channels=self.vae.out_channels,
            model_max_length=self.entries["text_encoder"]["model_max_length"],
        )
        self.denoiser = self._place(denoiser, self.dtype)
        if self.fp8_storage:
            store_linears_in_fp8(self.denoiser)
        if self.nf4_storage:
            store_linears_in_nf4(self.denoiser)

    def _place(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        return module.to(self.device, dtype).eval().requires_grad_(False)

    def _frame_size(self) -> tuple[int, int, int]:
        return self.video.num_frames, self.video.height, self.video.width

    def latent_shape(self) -> tuple[int, int, int, int]:
        return (self.vae.out_channels, *self.vae.get_latent_size(self._frame_size()))

    def timesteps(self, batch: int) -> Tensor:
        return rflow_timesteps(
            self.num_sampling_steps,
            batch,
            self._info(batch) if self.transform else None,
            num_timesteps=self.num_timesteps,
            discrete=self.discrete,
        ).to(self.device)

    def _info(self, batch: int) -> dict[str, Tensor]:
        size = (self.video.height, self.video.width)
        return prepare_multi_resolution_info(
            self.multi_resolution, batch, size, self.video.num_frames, self.video.fps, "cpu", torch.float32
        )

    def velocity(
        self,
        text: Sequence[Tensor],
        *,
        guided: bool = True,
        null_grad: bool = True,
        observe: VelocityObserver | None = None,
    ) -> Callable[..., Tensor]:
        features, mask = pad_text(text, self.device)
        null = self.denoiser.y_embedder.y_embedding[: features.shape[1]].to(features)
        info = self._info(len(text))
        info |= {key: info[key].to(self.device) for key in info if key not in ("height", "width")}
        return guided_velocity(
            self.denoiser,
            features[:, None],
            null.expand(len(text), 1, -1, -1),
            mask,
            info,
            guidance_scale=self.guidance_scale if guided else 1,
            null_grad=null_grad,
            observe=observe,
        )

    def decode(self, z: Tensor) -> Tensor:
        return self._decode(z, self.video.num_frames)

    def decode_frames(self, z: Tensor, index: Tensor) -> Tensor:
        if self.decode_context == "causal":
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

    @property
    def _blocks(self) -> list[nn.Module]:
        return [*self.denoiser.spatial_blocks, *self.denoiser.temporal_blocks]

    def residual_branches(self) -> list[nn.Module]:
        return [branch for block in self._blocks for branch in (block.attn, block.cross_attn, block.mlp)]

    def compile_blocks(self) -> None:
        # Spatial or temporal, with or without a gradient, of training or validation, captions of one length or not:
        # each is one program. Past the limit blocks would run uncompiled, without a word.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        # The turn of rotary positions is one operation of its own, compiled or not.
        warnings.filterwarnings(
            "ignore", message="Torchinductor does not support code generation for complex"
        )
        for block in self._blocks:
            block.compile(dynamic=False)

    def enable_checkpointing(self, keep_attention: bool = False) -> None:
        self.checkpointing = True
        set_grad_checkpoint(self.denoiser, **({"keep_attention": True} if keep_attention else {}))
        # opensora's switch does not reach the image VAE, which is diffusers' and holds most of a decoded frame.
        for module in self.vae.modules():
            if isinstance(module, ModelMixin):
                module.enable_gradient_checkpointing()
        # Upstream checkpoints reentrantly, which loses the adapter's gradient in blocks whose input has none.
        self.denoiser.x_embedder.register_forward_hook(_require_grad)

    def encode_references(self, paths: Sequence[str]) -> list[list[Tensor]]:
        return collect_references_batch(list(paths), self.vae, (self.video.height, self.video.width))

    def condition(
        self,
        z: Tensor,
        references: list[list[Tensor]],
        strategies: list[str],
        loop: int,
        align: int | None,
    ) -> Tensor | None:
        return apply_mask_strategy(z, references, strategies, loop, align)

    def continue_clip(
        self,
        video: Tensor,
        references: list[list[Tensor]],
        strategies: list[str],
        loop: int,
        length: int,
        edit: float,
    ) -> tuple[list[list[Tensor]], list[str]]:
        # The VAE codes whole clips and chunks on their own, so the tail is coded as the start of a clip is.
        tail = video[:, :, -self.overlap(length) :].to(self.vae.dtype)
        return append_generated(self.vae, tail, references, strategies, loop, length, edit)

    def overlap(self, latent_frames: int) -> int:
        frames = self.video.num_frames
        chunk = min(self.entries["vae"].get("micro_frame_size", CHUNK_FRAMES) or frames, frames)
        whole, rest = divmod(latent_frames, -(-chunk // TIME_FACTOR))
        # A chunk is padded in front to whole latent frames; its first one holds so many pixel frames fewer.
        return whole * chunk + max(0, rest * TIME_FACTOR - -chunk % TIME_FACTOR)


def _require_grad(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Forward hook: where a graph is kept, the output is part of it."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def _entry_errors(key: str, entry: dict) -> list[str]:
    """Unknown type, unknown keys and ill-typed counts of a network's entry."""
    if entry["type"] not in NETWORKS[key]:
        return [f"{key}.type is {entry['type']!r}; it must be {' or '.join(NETWORKS[key])}"]
    allowed = list(inspect.signature(MODELS.get(entry["type"])).parameters)
    if "kwargs" in allowed:  # the denoiser's builders hand them on to its configuration
        allowed += inspect.signature(STDiT3Config).parameters
        allowed += ["force_huggingface", "enable_sequence_parallelism"]
    errors = [f"{key}: {unknown_key(name, allowed)}" for name in entry if name not in ("type", *allowed)]
    return errors + _count_errors(key, entry)


def _count_errors(key: str, entry: dict) -> list[str]:
    return [
        f"{key}.{name} must be a whole number of at least 1, got {entry[name]!r}"
        for name in COUNTS
        if entry.get(name) is not None and (type(entry[name]) is not int or entry[name] < 1)
    ]


def _package_errors(config) -> list[str]:
    """What is asked for, and not in upstream's own opensora package where that is in use."""
    asked = {}
    if config.is_vader_training and config.grad_checkpoint == "keep_attention":
        asked["grad_checkpoint='keep_attention'"] = (set_grad_checkpoint, "keep_attention")
    if config.text_encoding == "8bit":
        asked["text_encoding='8bit'"] = (MODELS.get("t5"), "load_in_8bit")
    return [
        f"{setting} is not in upstream's opensora package; choose another value"
        for setting, (function, parameter) in asked.items()
        if parameter not in inspect.signature(function).parameters
    ]


def _length_errors(config) -> list[str]:
    """The timestep transform counts whole chunks: without one it divides zero by zero."""
    try:
        frames = get_num_frames(config.num_frames)
    except ValueError:
        return []  # said of num_frames itself
    if not config.scheduler.get("use_timestep_transform") or frames == 1 or frames >= CHUNK_FRAMES:
        return []
    return [
        f"num_frames={config.num_frames!r} is too short for scheduler.use_timestep_transform, which counts chunks of "
        f"{CHUNK_FRAMES} frames; use at least {CHUNK_FRAMES}, 1 for an image, or use_timestep_transform=False"
    ]


def _scheduler_errors(entry: dict) -> list[str]:
    """Unknown, missing or ill-typed keys of the sampler's entry."""
    errors = [
        f"scheduler.{key} is not known; allowed are {', '.join(SCHEDULER_KEYS)}"
        for key in entry
        if key not in SCHEDULER_KEYS
    ]
    if entry["type"] != "rflow":
        errors.append(f"scheduler.type must be 'rflow', got {entry['type']!r}")
    for key, kind in SCHEDULER_KEYS.items():
        value = entry.get(key)
        if value is not None and (not isinstance(value, kind) or (kind is not bool and value is True)):
            errors.append(f"scheduler.{key} has the wrong type: {value!r}")
    errors += [
        f"scheduler.{key} is missing; set it to a number"
        for key in ("num_sampling_steps", "cfg_scale")
        if entry.get(key) is None
    ]
    if isinstance(entry.get("num_sampling_steps"), int) and entry["num_sampling_steps"] < 1:
        errors.append(f"scheduler.num_sampling_steps must be at least 1, got {entry['num_sampling_steps']}")
    return errors
