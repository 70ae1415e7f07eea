"""What model families of diffusers have in common: keys, loading, captions, guidance and schedule.

A family adds its networks, how its denoiser is called, and how its VAE's latents become pixels.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, L text tokens, D text width,
N sampling steps.
"""

import functools
import html
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from packaging.version import Version
from torch import Tensor, nn

from Core.modules import sharding
from Core.modules.autocast import keep_out_of_autocast
from Core.sampling import guidance
from Core.sampling.euler import Predict
from Core.sampling.guidance import Combine, PredictionObserver
from Core.utils.damage import read_settings
from Core.utils.hub import locate, missing_local, present
from Core.utils.options import video_option

from .base import (
    Backbone,
    FamilySettings,
    Features,
    ModelSettings,
    VideoSettings,
    VideoSpec,
    file_identity,
    weight_errors,
)
from .diffusers_files import INDEX, PipelineWeight, component_config, weight_files
from .image_prompts import refuse_pictures
from .padded_text import PaddedText

DIFFUSERS = "0.42"  # the oldest with every family's pipeline
VAE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Published:
    """A published pipeline.

    Args:
        licence: of its weights.
        size: download in bytes without the text encoder, from parameter counts and the dtype of the files.
        text_size: of tokenizer and text encoder.
    """

    licence: str
    size: int
    text_size: int


@dataclass(frozen=True, kw_only=True)
class DiffusersSettings(FamilySettings):
    """Keys that the families of diffusers share."""

    model_path: str = video_option("", "hub id or local folder of the pipeline, in the layout of diffusers")
    text_encoder_path: str | None = video_option(
        None, "the same for its tokenizer and text encoder; None = model_path"
    )
    weights_variant: str = video_option("", "variant of the weight files, such as `fp16`")
    vae_dtype: Literal["bf16", "fp32"] = video_option(
        "bf16",
        "dtype of the VAE where dtype is `bf16` or `fp8`; with `fp16` and `fp32` it computes in float32",
    )
    vae_tiling: bool = video_option(
        False, "decode large frames in overlapping tiles: less memory, and faint differences along the seams"
    )
    negative_prompt: str = video_option("", "caption that guidance leads away from")
    num_sampling_steps: int = video_option(50, "sampling steps of a video", minimum=1, maximum=1000)
    guidance_scale: float = video_option(5.0, "classifier-free guidance scale; 1 = off", minimum=1)
    max_sequence_length: int = video_option(512, "text tokens", minimum=1, maximum=1 << 16)


class DiffusersBackbone(Backbone):
    """A model family that diffusers has a pipeline for.

    Class attributes beside those of ``Backbone``:
        pipelines: classes that ``model_index.json`` may name.
        denoiser_class: name of the denoiser's class in diffusers.
        components: folders that training needs; the first is the denoiser.
        optional_components: those that only some of its pipelines have.
        text_components: folders that encoding captions needs.
        published: hub id → what is known of it; the first is the default.
        sizes: resolution → height:width → (height, width) in pixels.
        time_factor: frames of a latent frame after the first.
        latent_group: latent frames after the first come in groups of so many.
        multiple: height and width are multiples of it; larger where ``size_multiple`` finds so.
    """

    pipelines: ClassVar[tuple[str, ...]]
    denoiser_class: ClassVar[str]
    components: ClassVar[tuple[str, ...]] = ("transformer", "vae", "scheduler")
    optional_components: ClassVar[tuple[str, ...]] = ()
    text_components: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    published: ClassVar[Mapping[str, Published]]
    sizes: ClassVar[Mapping[str, Mapping[str, tuple[int, int]]]]
    time_factor: ClassVar[int] = 4
    latent_group: ClassVar[int] = 1
    multiple: ClassVar[int] = 16
    text_weights = ("text_encoder_path",)
    obeys = frozenset(
        ["dtype", "base_quant", "text_encoding", "compile_blocks", "grad_checkpoint"]
        + ["guidance_grad", "decode_context", "shard_frozen", "stream_blocks"]
        + ["activation_offloading"]
    )
    recomputations: ClassVar[tuple[bool | str, ...]] = (True, False, "parts")

    settings: Any

    def __init__(self, settings: Any, models: ModelSettings, video: Any, device: torch.device):
        super().__init__(settings, models, video, device)
        self.checkpointing = False

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "settings_class" in vars(cls):
            cls.weights = cls.weights_of(cls.settings_class())

    # Before anything loads

    @classmethod
    def weights_of(cls, settings: Any) -> dict[str, Any]:
        nothing = Published(licence="", size=0, text_size=0)

        def weight(source: str, components: tuple[str, ...], of_text: bool) -> PipelineWeight:
            known = cls.published.get(source, nothing)
            return PipelineWeight(
                source=source,
                components=components,
                optional=() if of_text else cls.optional_components,
                variant=settings.weights_variant,
                size=known.text_size if of_text else known.size,
                licence=known.licence,
            )

        source = settings.model_path
        return {
            "model_path": weight(source, cls.components, False),
            "text_encoder_path": weight(settings.text_encoder_path or source, cls.text_components, True),
        }

    @classmethod
    def frame_size(cls, resolution: str, aspect_ratio: str) -> tuple[int, int]:
        try:
            return cls.sizes[resolution][aspect_ratio]
        except KeyError:
            known = "; ".join(f"{name} with {', '.join(ratios)}" for name, ratios in cls.sizes.items())
            raise ValueError(
                f"resolution {resolution!r} with aspect_ratio {aspect_ratio!r} is not in this family's table: {known} "
                "(height:width); or set image_size=(height, width)"
            ) from None

    @classmethod
    def frame_count(cls, num_frames: str | int, fps: float) -> int:
        """A duration is rounded down to whole groups of latent frames, and the first frame is added."""
        if isinstance(num_frames, int) or num_frames.isdecimal():
            return int(num_frames)
        step = cls.time_factor * cls.latent_group
        try:
            if not num_frames.endswith("s"):
                raise ValueError(num_frames)
            seconds = float(num_frames[:-1])
            return int(seconds * fps) // step * step + 1
        except (ValueError, OverflowError):
            raise ValueError(
                f"num_frames must be a number or seconds such as '5s', got {num_frames!r}"
            ) from None

    @classmethod
    def count_latent_frames(cls, num_frames: int, settings: Any) -> int:
        return (num_frames - 1) // cls.time_factor + 1

    @classmethod
    def num_sampling_steps(cls, settings: Any) -> int:
        return settings.num_sampling_steps

    @classmethod
    def config_errors(
        cls, settings: Any, models: ModelSettings, video: VideoSettings, training: bool
    ) -> list[str]:
        if Version(installed := version("diffusers")) < Version(DIFFUSERS):
            return [
                f"backbone={models.backbone!r} needs diffusers {DIFFUSERS}, and {installed} is installed; upgrade"
            ]
        errors = weight_errors("model_path", settings.model_path or None)
        if not errors:
            weights = cls.weights_of(settings).items()
            errors += [f"{key}: {lack}" for key, weight in weights if (lack := missing_local(weight))]
        weight = cls.weights_of(settings)["model_path"]
        folder = None if errors else present(weight)
        errors += cls.sampler_errors(settings) if training else []
        try:
            spec = cls.video_spec(video)
        except ValueError:
            return errors  # said of the video itself
        errors += cls.length_errors(spec.num_frames)
        if folder and not weight.lacks(folder):
            errors += cls.folder_errors(folder, settings, spec)
        return errors

    @classmethod
    def sampler_errors(cls, settings: Any) -> list[str]:
        """A sampler of finished videos alone, where training is asked for; training takes the default one."""
        default = getattr(cls.settings_class, "sampler", None)
        chosen = getattr(settings, "sampler", default)
        if chosen == default:
            return []
        return [f"sampler={chosen!r} is for inference; remove it or set is_vader_training=False"]

    @classmethod
    def length_errors(cls, frames: int) -> list[str]:
        step = cls.time_factor * cls.latent_group
        over = (frames - 1) % step
        if not over or frames < 1:
            return []
        below = frames - over
        return [
            f"num_frames must be a multiple of {step} plus 1, got {frames}; the nearest are {below} and {below + step}"
        ]

    @classmethod
    def folder_errors(cls, folder: Path, settings: Any, video: VideoSpec) -> list[str]:
        """What is wrong with a configuration for the pipeline in ``folder``; reads its JSON files alone."""
        try:
            kind = read_settings(folder / INDEX).get("_class_name")
            if kind not in cls.pipelines:
                return [
                    f"model_path: {settings.model_path!r} holds a {kind}, and this family needs a "
                    f"{' or '.join(cls.pipelines)}; choose another repository or backbone"
                ]
            return cls.size_errors(cls.size_multiple(folder), video) + cls.pipeline_errors(folder, settings)
        except (ValueError, OSError, KeyError, TypeError) as error:
            return [f"model_path: {settings.model_path!r} cannot be read: {error}"]

    @classmethod
    def pipeline_errors(cls, folder: Path, settings: Any) -> list[str]:
        """What is wrong with the family's keys for its pipeline in ``folder``; reads JSON files alone."""
        return []

    @classmethod
    def prompt_errors(
        cls, prompts: Sequence[Any], settings: Any, video: VideoSettings, training: bool
    ) -> list[str]:
        return refuse_pictures(prompts)

    @classmethod
    def size_multiple(cls, folder: Path) -> int:
        """What height and width must be a multiple of, for the pipeline in ``folder``."""
        return cls.multiple

    @classmethod
    def size_errors(cls, multiple: int, video: VideoSpec) -> list[str]:
        size = (video.height, video.width)
        if not any(side % multiple for side in size):
            return []
        nearest = tuple(max(multiple, round(side / multiple) * multiple) for side in size)
        return [f"height and width must be multiples of {multiple}, got {size}; the nearest are {nearest}"]

    @classmethod
    def denoiser_shapes(cls, settings: Any) -> Mapping[str, Sequence[int]]:
        folder = present(cls.weights_of(settings)["model_path"])
        if folder is None:
            return {}
        parts = cls.denoiser_parts(folder)
        return {
            prefix + name: shape
            for prefix, part in parts.items()
            for name, shape in cls._component_shapes(folder, part).items()
        }

    @classmethod
    def denoiser_parts(cls, folder: Path) -> Mapping[str, str]:
        """Folders that hold the denoiser's networks, by what their names begin with in the whole."""
        return {"": cls.components[0]}

    @classmethod
    def _component_shapes(cls, folder: Path, component: str) -> Mapping[str, Sequence[int]]:
        """From a network's configuration; empty where that is of another class or none, which is said elsewhere."""
        try:
            config = component_config(folder, component)
            if config.get("_class_name") != cls.denoiser_class:
                return {}
            with torch.device("meta"):
                network = _class_of_diffusers(cls.denoiser_class).from_config(dict(config))
        except (ValueError, OSError, KeyError, TypeError):
            return {}
        return {name: parameter.shape for name, parameter in network.named_parameters()}

    def fetch(self, text_encoder: bool = True) -> list[str]:
        errors = super().fetch(text_encoder)
        # What a repository holds is known once it is here.
        return errors or self.folder_errors(self.folder, self.settings, self.video)

    # Files

    @functools.cached_property
    def folder(self) -> Path:
        """The pipeline on this machine."""
        return locate(self.weights_of(self.settings)["model_path"])

    @functools.cached_property
    def text_folder(self) -> Path:
        return locate(self.weights_of(self.settings)["text_encoder_path"])

    def read_config(self, component: str) -> Mapping[str, Any]:
        return component_config(self.folder, component)

    def load_network(self, kind: type, component: str, dtype: torch.dtype) -> nn.Module:
        """A network of diffusers with its weights, on the CPU; what must stay float32 stays so, also under autocast."""
        if self.mesh is not None and component.startswith(self.components[0]):
            network = self._unfilled_network(kind, component, dtype)
        else:
            network = kind.from_pretrained(  # type: ignore[attr-defined]
                self.folder,
                subfolder=component,
                dtype=dtype,
                variant=self.settings.weights_variant or None,
                local_files_only=True,
                use_safetensors=True,
            )
        keep_out_of_autocast(network, getattr(network, "_keep_in_fp32_modules", None) or ())
        return network

    def _unfilled_network(self, kind: Any, component: str, dtype: torch.dtype) -> nn.Module:
        """The same with its parameters on the meta device, for ``load`` to fill."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # as from_pretrained does, for what a constructor computes
        try:
            with sharding.parameters_on_meta():
                network = kind.from_config(dict(self.read_config(component)))
        finally:
            torch.set_default_dtype(before)
        exact = set(kind._keep_in_fp32_modules or ())
        for name, parameter in network.named_parameters():
            kept = torch.float32 if exact & set(name.split(".")) else dtype
            parameter.data = parameter.data.to(kept)
        self.unfilled.append((network, weight_files(self.folder / component, self.settings.weights_variant)))
        return network

    def load_denoiser(self) -> nn.Module:
        return self.load_denoiser_part(self.components[0])

    def load_denoiser_part(self, component: str) -> nn.Module:
        """One of the denoiser's networks, from its folder."""
        return self.load_network(_class_of_diffusers(self.denoiser_class), component, self.dtype)

    def load_text_model(self, kind: type, component: str = "text_encoder") -> nn.Module:
        """A text encoder of transformers, where and as ``text_encoding`` says."""
        extra: dict[str, Any] = {}
        if self.models.text_encoding == "8bit":
            from transformers import BitsAndBytesConfig

            extra["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        network = kind.from_pretrained(  # type: ignore[attr-defined]
            self.text_folder,
            subfolder=component,
            dtype=self.dtype,
            variant=self.settings.weights_variant or None,
            local_files_only=True,
            use_safetensors=True,
            **extra,
        )
        network = network if extra else network.to(self.text_device)
        return network.eval().requires_grad_(False)

    @property
    def text_device(self) -> torch.device:
        return torch.device("cpu") if self.models.text_encoding == "cpu" else self.device

    def padded_text(self, kind: type, *, masked: bool, trim: bool) -> PaddedText:
        """The encoder of a family with one tokenizer and one encoder, see ``PaddedText``."""
        length = self.settings.max_sequence_length
        tokenizer, network = self.load_tokenizer(), self.load_text_model(kind)
        return PaddedText(tokenizer, network, length, self.text_device, masked=masked, trim=trim)

    def load_tokenizer(self, component: str = "tokenizer") -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.text_folder / component, local_files_only=True)

    @property
    def vae_dtype(self) -> torch.dtype:
        # A VAE's activations overflow float16.
        return (
            torch.float32
            if self.dtype in (torch.float16, torch.float32)
            else VAE_DTYPES[self.settings.vae_dtype]
        )

    def _place(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
        # Loading gave each part its dtype.
        return module.to(device).eval().requires_grad_(False)

    def enable_checkpointing(self, keep_attention: bool = False) -> None:
        self.checkpointing = True
        for module in self.denoiser.modules():
            if getattr(module, "_supports_gradient_checkpointing", False):
                module.enable_gradient_checkpointing()

    # Captions

    @property
    def text_identity(self) -> str:
        source = self.settings.text_encoder_path or self.settings.model_path
        folder = Path(source).expanduser()
        # A hub id stands for itself: captions may all be in the cache, and the repository not here.
        local = (
            [file_identity(str(folder / part)) for part in self.text_components] if folder.exists() else []
        )
        parts = [
            type(self).__name__,
            *(local or [source]),
            self.settings.weights_variant,
            self.settings.max_sequence_length,
            self.dtype,
            self.models.text_encoding,
        ]
        return " ".join(map(str, parts))

    @property
    def is_guided(self) -> bool:
        return self.settings.guidance_scale > 1

    @property
    def negative_caption(self) -> str | None:
        return self.caption(self.settings.negative_prompt) if self.is_guided else None

    # Sampling

    @property
    def combine(self) -> Combine | None:
        """How guidance makes one of two predictions; None where it is off."""
        return guidance.linear(self.settings.guidance_scale)

    @abstractmethod
    def batch_text(self, text: Sequence[Features]) -> dict[str, Tensor]:
        """What conditions the denoiser, each [B, …] on its device."""

    @abstractmethod
    def predict(self, z: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The denoiser's prediction, as ``process`` takes it, at latent [B, C, T, h, w] and timesteps [B]."""

    def predictor(
        self,
        text: Sequence[Features],
        *,
        guided: bool = True,
        null_grad: bool = True,
        observe: PredictionObserver | None = None,
    ) -> Predict:
        combine = self.combine if guided else None
        rows = [*text, *({**features, **(self.negative or {})} for features in text if combine)]
        both = self.batch_text(rows)
        captions = {key: value[: len(text)] for key, value in both.items()}
        null = {key: value[-len(text) :] for key, value in both.items()}
        text_branch, null_branch, both_branch = map(self._branch, (captions, null, both))
        return guidance.guided(
            text_branch,
            null_branch,
            both_branch,
            combine,
            null_grad=null_grad,
            in_turn=self.checkpointing,
            observe=observe,
        )

    def _branch(self, condition: Mapping[str, Tensor]) -> Predict:
        return lambda z, t, generated=None: self.predict(z, t, condition)


def _class_of_diffusers(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def clean_caption(text: str) -> str:
    """Unicode mended, HTML entities resolved, white space collapsed, as the pipelines of diffusers clean captions."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def pad_features(text: Sequence[Tensor], length: int, device: torch.device) -> Tensor:
    """Caption features [L, D] of unequal length as one batch [B, length, D], zero past their ends."""
    padded = torch.zeros(len(text), length, text[0].shape[-1], dtype=text[0].dtype)
    for row, features in zip(padded, text, strict=True):
        row[: len(features)] = features
    return padded.to(device)
