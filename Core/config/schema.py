"""The configuration: an mmengine file and flags in, one validated, frozen object out."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from mmengine.config import Config as FileConfig

from Core.backbones import BACKBONES, Backbone, VideoSpec
from Core.data.prompts import check_prompt_file, read_prompts, read_validation_prompts
from Core.modules import lora
from Core.rewards import check_reward_config
from Core.rewards.hps import DEFAULT_VERSION
from Core.sampling.frame_choice import check_decode_frame
from Core.sampling.gradient_window import first_gradient_step
from Core.training.early_stopping import early_stop_errors
from Core.utils.options import ConfigError, FlagParser, add_flags, check_values, option, parse_literal

BASE = "base"  # stands for the model without an adapter wherever adapters are listed
BackpropMode = Literal["last", "rand", "specific"]
REQUIRED_ENTRIES = ("model", "vae", "text_encoder", "scheduler")
# Flags of upstream's scripts that name a key inside an entry.
NESTED_FLAGS = {
    "ckpt_path": ("model", "from_pretrained"),
    "num_sampling_steps": ("scheduler", "num_sampling_steps"),
    "cfg_scale": ("scheduler", "cfg_scale"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """All keys of a config file; each default stands here and nowhere else."""

    # What to make
    backbone: str = option("opensora", "model family")
    resolution: str | None = option("240p", "name of the resolution table's column")
    aspect_ratio: str | None = option("3:4", "height:width, a row of the resolution table")
    image_size: tuple[int, int] | None = option(None, "(height, width) in pixels, in place of the table")
    num_frames: str | int = option("2s", "`2s`, `4s`, `8s`, `16s`, or a number of frames; 1 makes images")
    fps: float = option(24, "frames per second the model is told", above=0)
    frame_interval: int = option(1, "the file plays at fps / frame_interval", minimum=1)
    save_fps: float | None = option(
        None, "frames per second of the file, in place of frame_interval", above=0
    )
    multi_resolution: str | None = option("STDiT2", "kind of size conditioning the weights were trained with")
    aes: float | None = option(6.5, "aesthetic score told to the model")
    flow: float | None = option(None, "motion score told to the model")
    camera_motion: str | None = option(None, "camera motion told to the model, such as `pan left`")

    # Models
    model: dict = option({}, "denoiser entry")
    vae: dict = option({}, "VAE entry")
    text_encoder: dict = option({}, "text encoder entry")
    scheduler: dict = option({}, "sampler entry: num_sampling_steps, cfg_scale, use_timestep_transform")
    dtype: Literal["bf16", "fp16", "fp32", "fp8"] = option(
        "bf16", "frozen weights; `fp8` stores the denoiser's in 8-bit float and computes in bf16"
    )
    base_quant: Literal["none", "nf4"] = option(
        "none", "`nf4` stores the frozen denoiser's layers in 4 bits (bitsandbytes) and computes in dtype"
    )
    text_encoding: Literal["device", "8bit", "cpu"] = option(
        "device",
        "where captions are encoded: on the `device`, there in `8bit` (bitsandbytes), or on the `cpu`",
    )
    text_cache: str = option("~/.cache/vader/text", "folder of cached prompt embeddings")

    # Prompts
    prompt: list[str] | None = option(None, "prompts, in place of prompt_path")
    prompt_path: str | None = option(None, "file with one prompt a line")
    start_index: int | None = option(None, "first line of prompt_path to use", minimum=0)
    end_index: int | None = option(None, "line of prompt_path to stop before", minimum=0)

    # Inference
    is_vader_training: bool = option(True, "train; False generates videos")
    num_sample: int = option(1, "videos per prompt, with seeds from `seed` upwards", minimum=1)
    save_gif: bool = option(False, "write an animated GIF beside each video")
    lora_scale: float = option(1.0, "strength of the adapter in inference, 0 turns it off", minimum=0)
    reference_path: list[str] | None = option(None, "per prompt: files to condition on, separated by `;`")
    mask_strategy: list[str] | None = option(None, "per prompt: which reference frames to keep, and where")
    loop: int = option(1, "clips per video, each continuing the one before", minimum=1)
    condition_frame_length: int = option(5, "latent frames a clip takes over from the one before", minimum=1)
    condition_frame_edit: float = option(0.0, "how far taken-over frames may change, 0 to 1", minimum=0)
    align: int | None = option(5, "latent frames a condition's position is rounded to", minimum=1)

    # Training
    reward_fn: str | dict = option("hps", "reward by name, path/to/file.py:Class, or {name: weight}")
    reward_args: dict = option({}, "arguments of the reward, for a mixture {name: arguments}")
    hps_version: Literal["v2.0", "v2.1"] = option(DEFAULT_VERSION, "weights of the hps reward")
    lr: float = option(2e-4, "learning rate of AdamW", above=0)
    lr_schedule: Literal["constant", "cosine", "linear"] = option("constant", "course of lr after warm-up")
    lr_warmup_steps: int = option(0, "optimiser steps over which lr rises to its full value", minimum=0)
    ema_decay: float = option(
        0.0, "moving average of the adapter, which is what is validated and exported; 0 off", minimum=0
    )
    adam_betas: tuple[float, float] = option((0.9, 0.999), "decay of AdamW's two moments")
    weight_decay: float = option(0.01, "AdamW's weight decay", minimum=0)
    use_AdamW8bit: bool = option(False, "keep the optimiser's state in 8 bits (bitsandbytes)")
    max_grad_norm: float = option(1.0, "gradient norm to clip at", above=0)
    train_batch_size: int = option(1, "videos per process and backward pass", minimum=1)
    gradient_accumulation_steps: int = option(8, "backward passes per optimiser step", minimum=1)
    num_train_epochs: int = option(200, "passes over the prompts at most", minimum=1)
    max_train_steps: int = option(800, "optimiser steps at most", minimum=1)
    lora_rank: int = option(16, "rank of the adapter", minimum=1)
    lora_alpha: int = option(8, "the adapter's output is scaled by alpha / rank", minimum=1)
    lora_dropout: float = option(0.0, "dropout in front of the adapter while training", minimum=0)
    lora_targets: list[str] | None = option(None, "suffixes of the layers adapted; None for the family's own")
    lora_ckpt_path: str | list[str] | None = option(
        None,
        "adapter to start from or to sample with; in inference also several, `base` being the plain model",
    )
    backprop_mode: BackpropMode = option(
        "last",
        "steps that keep gradients: `last`, `rand` (cut-off drawn uniformly), `specific` (from step 15)",
    )
    backprop_steps: int = option(1, "number of steps of backprop_mode `last`", minimum=1)
    guidance_grad: Literal["both", "cond"] = option(
        "both", "branches of guidance that keep gradients; `cond` saves the null branch's memory"
    )
    noise_repeats: int = option(
        1, "gradients per video: the last step is taken so often, from new noise (DRaFT-LV)", minimum=1
    )
    detach_input: bool = option(False, "stop the gradient at each step's latent input (DRTune)")
    kl_weight: float = option(0.0, "weight of the squared velocity distance to the base model", minimum=0)
    decode_frame: str | int = option(
        -1, "latent frames scored: -1 one at random, `fml` first, middle, last, `all`, `alt`, or a number"
    )
    decode_context: Literal["isolated", "causal"] = option(
        "isolated",
        "what a scored frame is decoded from: its latent frame `isolated`, as the reference does, or its whole chunk "
        "(`causal`), so that it is a frame of the finished video",
    )
    prefix_steps: int | None = option(
        None, "steps without a gradient at most, spread over those of the schedule; None takes all", minimum=1
    )
    prefix_cache: int = option(
        1, "steps without a gradient that share one computation of attention and MLP; 1 is exact", minimum=1
    )
    compile_blocks: bool = option(
        False,
        "compile the denoiser's blocks for training (torch.compile): to be tried on a GPU; the first step is slow",
    )
    grad_checkpoint: bool | Literal["keep_attention"] = option(
        True,
        "recompute activations in the backward pass to save memory; `keep_attention` keeps those of attention",
    )
    mixed_precision: Literal["bf16", "fp16", "no", "fp8"] = option(
        "bf16", "autocast of the trainable arithmetic; `fp8` needs hardware kernels and is refused"
    )
    seed: int = option(200, "every random draw follows from it", minimum=0)

    # Run
    project_dir: str = option("runs/vader", "folder of the run")
    validation_steps: int = option(10, "optimiser steps between validations", minimum=1)
    checkpointing_steps: int = option(50, "optimiser steps between checkpoints", minimum=1)
    keep_checkpoints: int = option(2, "newest checkpoints kept, besides the best by validation", minimum=1)
    resume: str = option(
        "auto", "`auto` continues the run in project_dir, `never` starts anew, or a checkpoint"
    )
    max_bad_steps: int = option(10, "steps in a row without a finite gradient that stop the run", minimum=1)
    monitors: list[str] = option([], "scorers that watch the validation videos, beside motion and diversity")
    monitor_args: dict = option({}, "arguments of the monitors, {name: arguments}")
    early_stop: dict | None = option(
        None, "stop when a monitor falls: dict(monitor=name, fall=share of its best, patience=validations)"
    )
    val_prompt_path: str | None = option(None, "prompts of validation; None takes the first training prompts")
    val_batch_size: int = option(1, "videos generated at once", minimum=1)
    num_val_seeds: int = option(
        1, "videos per validation prompt; from 2 on their diversity is measured", minimum=1
    )
    num_val_runs: int = option(2, "batches per validation", minimum=1)
    is_sample_preview: bool = option(
        False, "at each validation, save the frames the last step was trained on"
    )
    logger_type: Literal["wandb", "tensorboard"] = option("wandb", "tracker beside metrics.csv")
    use_wandb: bool = option(False, "start wandb when logger_type is wandb")
    wandb_entity: str | None = option(None, "wandb user or team")
    verbose: int = option(1, "0 quiet, 1 progress, 2 also the progress of each sample", minimum=0)
    check_only: bool | int = option(
        False,
        "check everything that can be checked, fetch the weights, and stop before loading them; a number is how many "
        "processes the run is to have, so that its global batch is checked too",
        minimum=1,
    )
    debug: bool = option(False, "find the operation behind a NaN (slow), one validation batch, no tracker")

    def __post_init__(self):
        errors = list(dict.fromkeys(cross_field_errors(self)))
        if errors:
            raise ConfigError(errors)

    @property
    def video(self) -> VideoSpec:
        family = BACKBONES[self.backbone]
        size = self.image_size or family.frame_size(self.resolution, self.aspect_ratio)  # type: ignore[arg-type]
        return VideoSpec(int(size[0]), int(size[1]), family.frame_count(self.num_frames), self.fps)

    @property
    def file_fps(self) -> float:
        return self.save_fps or self.fps / self.frame_interval

    @property
    def scores(self) -> dict[str, Any]:
        return {"aes": self.aes, "flow": self.flow, "camera_motion": self.camera_motion}

    @property
    def reward_arguments(self) -> dict:
        """``reward_args`` with ``hps_version`` given to the hps reward, unless they name a version themselves."""
        version = {"version": self.hps_version}
        if self.reward_fn == "hps":
            return {**version, **self.reward_args}
        parts = self.reward_fn if isinstance(self.reward_fn, dict) else ()
        if "hps" in parts or self.reward_fn == "aesthetic_hps":
            return {**self.reward_args, "hps": {**version, **self.reward_args.get("hps", {})}}
        return self.reward_args

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write a config file that gives this configuration again."""
        lines = [f"{key} = {value!r}\n" for key, value in self.to_dict().items()]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(lines), encoding="utf-8")
        os.replace(partial, path)


def cross_field_errors(config: Config) -> list[str]:
    """Sentences on values that do not go together or name what is not there; loads nothing."""
    missing = [key for key in REQUIRED_ENTRIES if "type" not in getattr(config, key)]
    errors = [f"{key} must be an entry with a type, such as {key} = dict(type=…)" for key in missing]
    if config.backbone not in BACKBONES:
        return [*errors, f"backbone must be one of {', '.join(BACKBONES)}, got {config.backbone!r}"]
    if not errors:
        errors += BACKBONES[config.backbone].config_errors(config)
    errors += _video_errors(config)
    errors += _prompt_errors(config)
    errors += _training_errors(config) if config.is_vader_training else _inference_errors(config)
    if not errors:
        errors += _content_errors(config)
    return errors + _path_errors(config)


def _video_errors(config: Config) -> list[str]:
    if config.image_size is None and (config.resolution is None or config.aspect_ratio is None):
        return ["give image_size=(height, width), or resolution and aspect_ratio"]
    try:
        video = config.video
    except ValueError as error:
        return [str(error)]
    sizes = (video.height, video.width, video.num_frames)
    if min(sizes) < 1:
        return [f"height, width and num_frames must be positive, got {sizes}"]
    return []


def _prompt_errors(config: Config) -> list[str]:
    if config.prompt is None and config.prompt_path is None:
        return ["no prompts: set prompt_path to a file with one prompt a line, or prompt to a list"]
    paths: dict[str, Any] = {} if config.prompt is not None else {"prompt_path": config.prompt_path}
    if config.is_vader_training and config.val_prompt_path:
        paths["val_prompt_path"] = config.val_prompt_path
    errors = [error for key, path in paths.items() for error in check_prompt_file(key, path)]
    if config.prompt is not None and not any(text.strip() for text in config.prompt):
        errors.append("prompt is empty; give at least one prompt")
    start, end = config.start_index or 0, config.end_index
    if end is not None and end <= start:
        errors.append(f"end_index ({end}) must be above start_index ({start})")
    return errors


def _training_errors(config: Config) -> list[str]:
    errors = check_reward_config(config.reward_fn, config.reward_arguments)
    if config.mixed_precision == "fp8":
        errors.append(
            "mixed_precision='fp8' is not supported: the adapter needs bf16 arithmetic; use 'bf16', and "
            "dtype='fp8' to store the frozen weights in 8 bits"
        )
    if config.base_quant == "nf4" and config.dtype == "fp8":
        errors.append(
            "base_quant='nf4' and dtype='fp8' both say how weights are stored; set dtype='bf16' with nf4"
        )
    for key in ("lora_dropout", "ema_decay"):
        if getattr(config, key) >= 1:
            errors.append(f"{key} must be below 1, got {getattr(config, key)}")
    errors += _speed_errors(config)
    errors += _monitor_errors(config)
    if isinstance(config.lora_ckpt_path, list):
        errors.append(f"lora_ckpt_path must be one adapter in training, got {config.lora_ckpt_path!r}")
    single = {"loop": 1, "reference_path": None, "mask_strategy": None}
    errors += [
        f"{key} is for inference; remove it or set is_vader_training=False"
        for key, value in single.items()
        if getattr(config, key) != value
    ]
    if not all(0 <= beta < 1 for beta in config.adam_betas):
        errors.append(f"adam_betas must be at least 0 and below 1, got {config.adam_betas!r}")
    return errors + _window_errors(config)


def _speed_errors(config: Config) -> list[str]:
    """Whether the model family has what the faster ways of sampling ask for, and they go together."""
    family, errors = BACKBONES[config.backbone], []
    if config.compile_blocks and family.compile_blocks is Backbone.compile_blocks:
        errors.append(f"{family.__name__} has no blocks to compile; set compile_blocks=False")
    if config.prefix_cache > 1 and family.residual_branches is Backbone.residual_branches:
        errors.append(f"{family.__name__} has no blocks whose outputs could be kept; set prefix_cache=1")
    # What these keep or widen inside a block is not compiled with it, or fails to be recomputed.
    uncompiled: dict[str, tuple[bool, Any]] = {"prefix_cache": (config.prefix_cache > 1, 1)}
    uncompiled["grad_checkpoint"] = (config.grad_checkpoint == "keep_attention", True)
    uncompiled["dtype"] = (config.dtype == "fp8", "bf16")
    uncompiled["base_quant"] = (config.base_quant != "none", "none")
    errors += [
        f"compile_blocks=True and {key}={getattr(config, key)!r} do not go together; set compile_blocks=False or "
        f"{key}={other!r}"
        for key, (asked, other) in uncompiled.items()
        if config.compile_blocks and asked
    ]
    return errors


def _monitor_errors(config: Config) -> list[str]:
    errors = [
        f"monitors: {error}"
        for name in config.monitors
        for error in check_reward_config(name, config.monitor_args.get(name))
    ]
    errors += [
        f"monitor_args names {name!r}, which is not among the monitors"
        for name in config.monitor_args
        if name not in config.monitors
    ]
    return errors + early_stop_errors(config.early_stop, config.monitors)


def _window_errors(config: Config) -> list[str]:
    """Whether backprop_mode and decode_frame suit the number of steps and of latent frames."""
    errors = []
    steps = config.scheduler.get("num_sampling_steps")
    if isinstance(steps, int):  # or else the scheduler's own sentence says so
        try:
            first_gradient_step(config.backprop_mode, steps, lambda n: 0, config.backprop_steps)
        except ValueError as error:
            errors.append(str(error))
    if config.noise_repeats > 1 and (config.backprop_mode, config.backprop_steps) != ("last", 1):
        errors.append(
            "noise_repeats repeats the last step alone; set backprop_mode='last' and backprop_steps=1"
        )
    try:
        frames = BACKBONES[config.backbone].count_latent_frames(config.video.num_frames, config.vae)
        check_decode_frame(config.decode_frame, frames)
    except ValueError as error:
        errors.append(str(error))
    return errors


def _inference_errors(config: Config) -> list[str]:
    errors = []
    if config.condition_frame_edit > 1:
        errors.append(f"condition_frame_edit must be between 0 and 1, got {config.condition_frame_edit}")
    return errors + (_loop_errors(config) if config.loop > 1 else [])


def _content_errors(config: Config) -> list[str]:
    """What is wrong inside the prompts: segments, suffixes, and in inference references and mask strategies."""
    try:
        prompts = read_prompts(config)
        if config.is_vader_training:
            read_validation_prompts(config, prompts)
            return []
        return BACKBONES[config.backbone].prompt_errors(config, prompts)
    except ValueError as error:
        return [str(error)]


def _loop_errors(config: Config) -> list[str]:
    """Whether a clip can take over ``condition_frame_length`` latent frames and still make some of its own."""
    family = BACKBONES[config.backbone]
    if family.continue_clip is Backbone.continue_clip:
        return [f"loop={config.loop}, but {family.__name__} cannot continue a clip; set loop=1"]
    try:
        count = family.count_latent_frames(config.video.num_frames, config.vae)
    except ValueError as error:
        return [str(error)]
    if config.condition_frame_length < count:
        return []
    return [
        f"loop={config.loop} needs clips longer than what they take over: condition_frame_length is "
        f"{config.condition_frame_length} and a clip has {count} latent frames; lower condition_frame_length "
        "or raise num_frames"
    ]


def _path_errors(config: Config) -> list[str]:
    errors = []
    paths = config.lora_ckpt_path or []
    for path in [paths] if isinstance(paths, str) else paths:
        if path != BASE:
            errors += _adapter_errors(config, path)
    for key in ("project_dir", "text_cache"):
        folder = Path(getattr(config, key)).expanduser().absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not _writable(existing):
            errors.append(f"{key}: cannot write to {str(folder)!r}; choose a folder you may write to")
    return errors


def _adapter_errors(config: Config, path: str) -> list[str]:
    """Whether an adapter can be read, and be trained on with the scaling it has."""
    if not Path(path).expanduser().exists():
        return [f"lora_ckpt_path: there is no file or folder {path!r}"]
    try:
        adapter = lora.read(path)
    except (ValueError, OSError) as error:
        return [f"lora_ckpt_path: {error}"]
    wanted = {"lora_rank": adapter.rank, "lora_alpha": adapter.alpha}
    differing = {key: value for key, value in wanted.items() if value != getattr(config, key)}
    if not config.is_vader_training or not differing:
        return []
    has = " and ".join(f"{key}={value}" for key, value in differing.items())
    given = " and ".join(f"{key}={getattr(config, key)}" for key in differing)
    return [
        f"lora_ckpt_path: the adapter {path!r} has {has}, the configuration {given}, with which it would be "
        f"another adapter; set {has}"
    ]


def _writable(folder: Path) -> bool:
    """Whether a file can be made in ``folder``; asked of the disk, since permission bits do not bind root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def load_config(argv: Sequence[str] | None = None) -> Config:
    """The configuration of ``CONFIG [flags]``.

    Raises:
        ConfigError: with every error found; nothing has been loaded by then.
    """
    parser = FlagParser(
        description="Train a LoRA adapter by reward gradient, or generate videos (is_vader_training=False).",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="mmengine config file")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override any key, also inside an entry (model.from_pretrained=…)",
    )
    for flag in NESTED_FLAGS:
        entry, key = NESTED_FLAGS[flag]
        parser.add_argument(
            "--" + flag.replace("_", "-"), type=parse_literal, metavar="VALUE", help=f"{key} of {entry}"
        )
    add_flags(parser, Config)
    flags = vars(parser.parse_args(argv))
    return build_config(read_file(flags.pop("config"), flags.pop("cfg_options")), flags)


def read_file(path: str, overrides: list[str]) -> dict[str, Any]:
    """Keys of a config file after ``key=value`` overrides."""
    if not Path(path).is_file():
        raise ConfigError([f"config file {path!r} does not exist; give the path of a .py config"])
    malformed = [entry for entry in overrides if "=" not in entry]
    if malformed:
        raise ConfigError([f"--cfg-options takes KEY=VALUE, got {entry!r}" for entry in malformed])
    try:
        file = FileConfig.fromfile(path)
        file.merge_from_dict(
            {key: parse_literal(value) for key, _, value in (o.partition("=") for o in overrides)}
        )
    except Exception as error:  # a config file is a program, so anything may come out of it
        raise ConfigError(
            [f"config file {path!r} cannot be read: {type(error).__name__}: {error}"]
        ) from error
    values = file.to_dict()
    return {key: value for key, value in values.items() if not isinstance(value, ModuleType)}


def build_config(values: dict[str, Any], flags: dict[str, Any] | None = None) -> Config:
    """A validated configuration from file values and flags that override them."""
    values = {**values}
    for key, value in (flags or {}).items():
        if key not in NESTED_FLAGS:
            values[key] = value
        elif value is not None:
            entry, inner = NESTED_FLAGS[key]
            values[entry] = {**values.get(entry, {}), inner: value}
    if isinstance(values.get("prompt"), str):
        values["prompt"] = [values["prompt"]]
    errors = check_values(Config, values)
    if errors:
        # The rest is checked with the faulty values at their defaults, so that all errors come at once.
        faulty = {name for name in values if check_values(Config, {name: values[name]})}
        rest = {name: value for name, value in values.items() if name not in faulty}
        try:
            Config(**rest)
        except ConfigError as more:
            errors += more.errors
        raise ConfigError(list(dict.fromkeys(errors)))
    return Config(**values)
