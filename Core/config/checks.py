"""Sentences on values that do not go together or name what is not there; nothing is loaded."""

import math
import tempfile
from pathlib import Path
from typing import Any

from Core.data.prompts import prompt_file_errors
from Core.modules import base_adapters
from Core.rewards import check_reward_config, frames_needed, parts_without_gradient
from Core.sampling.frame_choice import frames_of_video, is_of_video
from Core.training.objectives.base import no_gradient_sentence
from Core.training.objectives.group import WHOLE_VIDEO

from .adapter_checks import adapter_errors
from .schema import Config

PIXEL_LIMIT = 1 << 33  # of a video: about a thousand frames of 4K
SLOWEST_FPS = 0.01
# Common keys that a family need not obey.
OPTIONAL_KEYS = (
    "dtype",
    "base_quant",
    "text_encoding",
    "compile_blocks",
    "grad_checkpoint",
    "guidance_grad",
    "decode_context",
    "shard_frozen",
    "stream_blocks",
    "activation_offloading",
    "decode_reach",
)
# What these keep or widen inside a block is not compiled with it, or fails to be recomputed: key → values refused, and
# the value to set.
UNCOMPILED: dict[str, tuple[tuple[str, ...], Any]] = {
    "grad_checkpoint": (("keep_attention", "parts"), True),
    "dtype": (("fp8",), "bf16"),
    "base_quant": (("nf4",), "none"),
}
# Keys that place tensors → what each does not go together with: key, value refused, value to set.
PLACEMENTS: dict[str, list[tuple[str, Any, Any]]] = {
    "shard_frozen": [
        ("stream_blocks", True, False),
        ("compile_blocks", True, False),
        ("dtype", "fp8", "bf16"),
        ("base_quant", "nf4", "none"),
    ],
    "stream_blocks": [("compile_blocks", True, False)],
    "activation_offloading": [
        ("compile_blocks", True, False),
        # A block would save all its activations, far more than its input.
        ("grad_checkpoint", False, True),
        # Selective checkpointing keeps attention's outputs itself, where no hook sees them.
        ("grad_checkpoint", "keep_attention", True),
    ],
}


def config_errors(config: Config) -> list[str]:
    """Everything that is wrong with a configuration beyond the types and ranges of its keys."""
    training = config.run.is_vader_training
    errors = _obeyed_errors(config) + _recompute_errors(config) + _family_bounds_errors(config)
    errors += _video_errors(config)
    errors += _pairs_errors(config)
    errors += config.backbone.config_errors(config.family, config.models, config.video, training)
    errors += prompt_file_errors(config.prompts, training)
    errors += _placement_errors(config)
    if training:
        errors += _training_errors(config)
    if not errors:
        errors += _prompt_errors(config) + (_frame_errors(config) if training else [])
    return errors + _path_errors(config)


def _obeyed_errors(config: Config) -> list[str]:
    """Common keys that the family has no use for."""
    values, defaults = config.flat(), config.defaults()
    return [
        f"{key}={values[key]!r} has no effect on backbone={config.models.backbone!r}; remove it"
        for key in OPTIONAL_KEYS
        if key in values and key not in config.backbone.obeys and values[key] != defaults[key]
    ]


def _recompute_errors(config: Config) -> list[str]:
    asked, known = config.models.grad_checkpoint, config.backbone.recomputations
    if asked in known or "grad_checkpoint" not in config.backbone.obeys:
        return []
    return [
        f"grad_checkpoint={asked!r} has no meaning for backbone={config.models.backbone!r}; set it to "
        f"{' or '.join(map(repr, known))}"
    ]


def _placement_errors(config: Config) -> list[str]:
    """What does not go together with a denoiser that is split, streamed, or keeps its activations on the CPU."""
    values = config.flat()
    return [
        f"{key}=True and {other}={refused!r} do not go together; set {key}=False or {other}={instead!r}"
        for key, rows in PLACEMENTS.items()
        for other, refused, instead in rows
        if values[key] and values[other] == refused
    ]


def machine_errors(config: Config, processes: int, device: str = "cuda") -> list[str]:
    """What a configuration needs that so many processes on such a device, ``cuda`` or ``cpu``, have not."""
    errors = []
    if config.models.shard_frozen and processes == 1:
        errors.append(
            "shard_frozen=True splits weights over processes, and there is one; start several, or set "
            "stream_blocks=True instead"
        )
    if config.models.stream_blocks and device == "cpu":
        errors.append(
            "stream_blocks=True brings weights from the CPU to a GPU, and this machine has none; set "
            "stream_blocks=False"
        )
    return errors


def _family_bounds_errors(config: Config) -> list[str]:
    """Common keys whose values are in bounds for other families alone."""
    values, family = config.flat(), config.models.backbone
    return [
        f"{error}, for backbone={family!r}"
        for key, bounds in config.backbone.key_bounds.items()
        if key in values
        for error in bounds.errors(key, values[key])
    ]


def _decode_errors(config: Config) -> list[str]:
    """A way of decoding that the family has not, or frames that the video has not."""
    objective: Any = config.objective
    if not hasattr(objective, "decode_context"):
        return []
    errors = _idle_decode_errors(config)
    if "decode_context" not in config.backbone.obeys or objective.decode_frame == WHOLE_VIDEO:
        return errors
    known = config.backbone.decode_contexts
    context, chosen = objective.decode_context, objective.decode_frame
    if context not in known:
        errors.append(
            f"decode_context={context!r} has no meaning for backbone={config.models.backbone!r}; set it to "
            f"{' or '.join(map(repr, known))}"
        )
    # Where no other way is known, a latent frame makes one frame of the video, alone as in it.
    elif (
        (ways := [repr(way) for way in known if way != "isolated"])
        and context == "isolated"
        and is_of_video(chosen)
    ):
        errors.append(
            f"decode_frame={chosen!r} asks for frames of the finished video; set decode_context to {' or '.join(ways)}"
        )
    try:
        frames_of_video(chosen, config.video_spec.num_frames, config.video_spec.fps)
    except ValueError as error:
        errors.append(str(error))
    return errors


def _idle_decode_errors(config: Config) -> list[str]:
    """Keys of decoding that another one leaves without effect."""
    values, defaults = config.flat(), config.defaults()
    whole, causal = values["decode_frame"] == WHOLE_VIDEO, values["decode_context"] == "causal"
    errors = []
    if whole and values["decode_context"] != defaults["decode_context"]:
        errors.append(
            f"decode_context={values['decode_context']!r} has no effect with decode_frame={WHOLE_VIDEO!r}; remove it, "
            "or set decode_frame to the frames to score"
        )
    reach_is_known = "decode_reach" in config.backbone.obeys  # else said of the family
    if reach_is_known and values["decode_reach"] != defaults["decode_reach"] and (whole or not causal):
        errors.append(
            f"decode_reach={values['decode_reach']!r} has an effect with decode_context='causal' alone; remove it, or "
            f"set decode_context='causal'{' and decode_frame to the frames to score' if whole else ''}"
        )
    return errors


def _pairs_errors(config: Config) -> list[str]:
    """A file of videos for a family that encodes none."""
    if not hasattr(config.objective, "pairs") or "pairs" in config.backbone.obeys:
        return []
    return [
        f"objective={config.optimizer.objective!r} needs a family that encodes videos, which "
        f"{config.models.backbone!r} does not; use objective='dpo', which makes its own pairs"
    ]


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
    if math.prod(sizes) > PIXEL_LIMIT:
        return [f"height × width × num_frames must be at most {PIXEL_LIMIT}, got {math.prod(sizes)}"]
    if video.file_fps < SLOWEST_FPS:
        return [
            f"fps / frame_interval must be at least {SLOWEST_FPS}, the slowest a file can play, got {video.file_fps:g}"
        ]
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


def _frame_errors(config: Config) -> list[str]:
    """Scorers of a valid configuration that see fewer frames than they need."""
    frames = config.video_spec.num_frames
    latent = config.backbone.count_latent_frames(frames, config.family)
    name, needed = frames_needed(config.reward.reward_fn, config.reward.arguments)
    scored = config.objective_class.count_scored_frames(config.objective, latent, config.video_spec)
    if needed > scored:
        return [
            f"reward {name!r} needs at least {needed} frames of a video, and gets {scored}; "
            "set decode_frame='all', or raise num_frames"
        ]
    arguments = config.validation.monitor_args
    needs = {
        monitor: frames_needed(monitor, arguments.get(monitor))[1] for monitor in config.validation.monitors
    }
    return [
        f"monitors: {monitor!r} needs videos of at least {needed} frames, and num_frames={frames}; remove it, or raise "
        "num_frames"
        for monitor, needed in needs.items()
        if needed > frames
    ]


def _compile_errors(config: Config) -> list[str]:
    values = config.flat()
    return [
        f"compile_blocks=True and {key}={values[key]!r} do not go together; set compile_blocks=False or {key}={other!r}"
        for key, (refused, other) in UNCOMPILED.items()
        if config.models.compile_blocks and values[key] in refused
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
    errors = adapter_errors(config)
    if entries := config.models.base_adapters:
        family = config.backbone
        errors += base_adapters.errors(entries, family.original_names, family.experts, config.denoiser_shapes)
    for key, value in (("project_dir", config.run.project_dir), ("text_cache", config.models.text_cache)):
        folder = Path(value).expanduser().absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not _writable(existing):
            errors.append(f"{key}: cannot write to {str(folder)!r}; choose a folder you may write to")
    return errors


def _writable(folder: Path) -> bool:
    """Whether a file can be made in ``folder``; asked of the disk, since permission bits do not bind root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
