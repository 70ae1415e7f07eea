"""Sentences on values that do not go together or name what is not there; nothing is loaded."""

import tempfile
from pathlib import Path
from typing import Any

from Core.data.prompts import prompt_file_errors
from Core.modules import base_adapters, lora
from Core.rewards import check_reward_config, parts_without_gradient
from Core.sampling.frame_choice import frames_of_video, is_of_video
from Core.training.objectives.base import no_gradient_sentence

from .schema import BASE, Config

# Common keys that a family need not obey.
OPTIONAL_KEYS = (
    "dtype",
    "base_quant",
    "text_encoding",
    "compile_blocks",
    "grad_checkpoint",
    "guidance_grad",
    "decode_context",
    "pairs",
)
# What these keep or widen inside a block is not compiled with it, or fails to be recomputed: key → its other value.
UNCOMPILED: dict[str, Any] = {"grad_checkpoint": True, "dtype": "bf16", "base_quant": "none"}


def config_errors(config: Config) -> list[str]:
    """Everything that is wrong with a configuration beyond the types and ranges of its keys."""
    training = config.run.is_vader_training
    errors = _obeyed_errors(config)
    errors += _video_errors(config)
    errors += config.backbone.config_errors(config.family, config.models, config.video, training)
    errors += prompt_file_errors(config.prompts, training)
    if training:
        errors += _training_errors(config)
    if not errors:
        errors += _prompt_errors(config)
    return errors + _path_errors(config)


def _obeyed_errors(config: Config) -> list[str]:
    """Common keys that the family has no use for."""
    values, defaults = config.flat(), config.defaults()
    return [
        f"{key}={values[key]!r} has no effect on backbone={config.models.backbone!r}; remove it"
        for key in OPTIONAL_KEYS
        if key in values and key not in config.backbone.obeys and values[key] != defaults[key]
    ]


def _decode_errors(config: Config) -> list[str]:
    """A way of decoding that the family has not, or frames that the video has not."""
    objective, known = config.objective, config.backbone.decode_contexts
    if "decode_context" not in config.backbone.obeys or not hasattr(objective, "decode_context"):
        return []
    context, chosen = objective.decode_context, objective.decode_frame
    errors = []
    if context not in known:
        errors.append(
            f"decode_context={context!r} has no meaning for backbone={config.models.backbone!r}; set it to "
            f"{' or '.join(map(repr, known))}"
        )
    elif context == "isolated" and is_of_video(chosen):
        ways = [repr(way) for way in known if way != "isolated"]
        errors.append(
            f"decode_frame={chosen!r} asks for frames of the finished video; set decode_context to {' or '.join(ways)}"
        )
    try:
        frames_of_video(chosen, config.video_spec.num_frames, config.video_spec.fps)
    except ValueError as error:
        errors.append(str(error))
    return errors


def _video_errors(config: Config) -> list[str]:
    video = config.video
    if video.image_size is None and (video.resolution is None or video.aspect_ratio is None):
        return ["give image_size=(height, width), or resolution and aspect_ratio"]
    try:
        spec = config.video_spec
    except ValueError as error:
        return [str(error)]
    sizes = (spec.height, spec.width, spec.num_frames)
    if min(sizes) < 1:
        return [f"height, width and num_frames must be positive, got {sizes}"]
    if max(sizes) > 1 << 16:
        return [f"height, width and num_frames must be at most {1 << 16}, got {sizes}"]
    return []


def _training_errors(config: Config) -> list[str]:
    errors = check_reward_config(config.reward.reward_fn, config.reward.arguments) or _gradient_errors(config)
    if config.optimizer.mixed_precision == "fp8":
        errors.append(
            "mixed_precision='fp8' is not supported: the adapter needs bf16 arithmetic; use 'bf16', and "
            "dtype='fp8' to store the frozen weights in 8 bits"
        )
    if config.models.base_quant == "nf4" and config.models.dtype == "fp8":
        errors.append(
            "base_quant='nf4' and dtype='fp8' both say how weights are stored; set dtype='bf16' with nf4"
        )
    if config.adapter.lora_targets == []:
        errors.append("lora_targets is empty; name layers, or set None for the family's own")
    if isinstance(config.adapter.lora_ckpt_path, list):
        errors.append(
            f"lora_ckpt_path must be one adapter in training, got {config.adapter.lora_ckpt_path!r}"
        )
    return (
        errors
        + _decode_errors(config)
        + _compile_errors(config)
        + _monitor_errors(config)
        + _objective_errors(config)
    )


def _gradient_errors(config: Config) -> list[str]:
    """Scorers without a gradient, where the objective needs one; what a scorer does not say shows in its first loss."""
    if not config.objective_class.needs_reward_gradient:
        return []
    found = parts_without_gradient(config.reward.reward_fn, config.reward.arguments)
    return [no_gradient_sentence(f"reward {name!r}") for name in found]


def _compile_errors(config: Config) -> list[str]:
    values = config.flat()
    return [
        f"compile_blocks=True and {key}={values[key]!r} do not go together; set compile_blocks=False or {key}={other!r}"
        for key, other in UNCOMPILED.items()
        if config.models.compile_blocks and values[key] in ("keep_attention", "fp8", "nf4")
    ]


def _monitor_errors(config: Config) -> list[str]:
    monitors, arguments = config.validation.monitors, config.validation.monitor_args
    errors = [
        f"monitors: {error}" for name in monitors for error in check_reward_config(name, arguments.get(name))
    ]
    errors += [
        f"monitor_args names {name!r}, which is not among the monitors"
        for name in arguments
        if name not in monitors
    ]
    return errors + _early_stop_errors(config)


def _early_stop_errors(config: Config) -> list[str]:
    rule = config.validation.early_stop
    if rule is None:
        return []
    known = ("reward", "motion", "diversity", *config.validation.monitors, "dynamic_degree")
    if "monitor" not in rule:
        return [f"early_stop must have the key monitor, and may have fall and patience; got {dict(rule)!r}"]
    if rule["monitor"] not in known:
        return [f"early_stop.monitor must be one of {', '.join(known)}, got {rule['monitor']!r}"]
    moving = {"motion", "dynamic_degree"} - set(config.validation.monitors)
    if rule["monitor"] in moving and _is_image(config):
        return [
            f"early_stop.monitor={rule['monitor']!r} needs videos of more than one frame; raise num_frames"
        ]
    if rule["monitor"] == "diversity" and config.validation.num_val_seeds < 2:
        return ["early_stop.monitor='diversity' is measured from num_val_seeds=2 on; raise num_val_seeds"]
    return []


def _is_image(config: Config) -> bool:
    try:
        return config.video_spec.num_frames == 1
    except ValueError:  # said of the video itself
        return False


def _objective_errors(config: Config) -> list[str]:
    try:
        frames = config.backbone.count_latent_frames(config.video_spec.num_frames, config.family)
    except ValueError:
        frames = None  # said of the video itself
    steps = config.backbone.num_sampling_steps(config.family)
    return config.objective_class.config_errors(config.objective, steps, frames)


def _prompt_errors(config: Config) -> list[str]:
    """What is wrong inside the prompts: the family's grammar, references, masks."""
    training = config.run.is_vader_training
    try:
        prompts = list(config.prompt_list)
        if training:
            prompts += config.validation_prompt_list
    except ValueError as error:
        return [str(error)]
    errors = config.backbone.prompt_errors(prompts, config.family, config.video, training)
    if training:
        errors += config.objective_class.prompt_errors(config.objective, config.prompt_list)
    return errors


def _path_errors(config: Config) -> list[str]:
    errors = []
    paths = config.adapter.lora_ckpt_path or []
    for path in [paths] if isinstance(paths, str) else paths:
        if path != BASE:
            errors += _adapter_errors(config, path)
    errors += base_adapters.errors(config.models.base_adapters, config.backbone.original_names)
    for key, value in (("project_dir", config.run.project_dir), ("text_cache", config.models.text_cache)):
        folder = Path(value).expanduser().absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not _writable(existing):
            errors.append(f"{key}: cannot write to {str(folder)!r}; choose a folder you may write to")
    return errors


def _adapter_errors(config: Config, path: str) -> list[str]:
    """Whether an adapter can be read, and be trained on with the scaling it has."""
    if not Path(path).expanduser().exists():
        return [f"lora_ckpt_path: there is no file or folder {path!r}"]
    try:
        adapter = lora.read(path, config.backbone.original_names)
    except (ValueError, OSError) as error:
        return [f"lora_ckpt_path: {error}"]
    given = {"lora_rank": config.adapter.lora_rank, "lora_alpha": config.adapter.lora_alpha}
    own = {"lora_rank": adapter.rank, "lora_alpha": adapter.alpha}
    differing = [key for key in own if own[key] != given[key]]
    if not config.run.is_vader_training or not differing:
        return []
    has = " and ".join(f"{key}={own[key]}" for key in differing)
    asked = " and ".join(f"{key}={given[key]}" for key in differing)
    return [
        f"lora_ckpt_path: the adapter {path!r} has {has}, but the configuration has {asked}; a loaded adapter keeps "
        f"its rank and alpha, so set {has}"
    ]


def _writable(folder: Path) -> bool:
    """Whether a file can be made in ``folder``; asked of the disk, since permission bits do not bind root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
