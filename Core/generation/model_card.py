"""The README.md of an adapter on the hub: what it is, how to use it, what it gained, under which licences."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from Core.config import Config
from Core.rewards import required_weights
from Core.utils.hub import Weight

from .gains import Gain

# Licences that the hub has an identifier for; the adapter of a base under another one is published as "other".
HUB_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
# Keys that are told even where they have their default.
ALWAYS_TOLD = ("objective", "lr", "max_train_steps", "lora_rank", "lora_alpha", "seed")


def model_card(name: str, config: Config, diffusers_folders: Mapping[str, str], gains: Sequence[Gain]) -> str:
    """Markdown with the hub's metadata on top.

    Args:
        name: hub id of the adapter, or what stands for it.
        config: of the run that the adapter comes from.
        diffusers_folders: by expert, the folder with what diffusers loads ('' for the top one); empty where diffusers
            loads no adapters of the family.
        gains: what was measured.
    """
    from huggingface_hub import ModelCardData

    weights = config.backbone.weights_of(config.family)
    base = next(weight for key, weight in weights.items() if key not in config.backbone.text_weights)
    data = ModelCardData(
        base_model=base.source.partition("@")[0] if _on_hub(base) else None,
        library_name="diffusers" if diffusers_folders else "peft",
        pipeline_tag="text-to-video",
        tags=["lora", "text-to-video", "reward-gradient"],
        license=HUB_LICENCES.get(base.licence, "other"),
    )
    sections = [
        f"# {name.rpartition('/')[2]}",
        f"A LoRA adapter for {_linked(base)}, trained with VADER by the objective `{config.optimizer.objective}`.",
        "## Use",
        *_usage(name, config, base, diffusers_folders),
        "## Gains",
        _gain_table(gains),
        "## Reward",
        _reward_table(config),
        "## Settings",
        _table(("key", "value"), [(f"`{key}`", f"`{value}`") for key, value in told_settings(config)]),
        "## Licences",
        _licence_table(config, base),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def told_settings(config: Config) -> Iterator[tuple[str, Any]]:
    """The keys that differ from their defaults, without those that name files or prompts of one machine."""
    defaults = config.defaults()
    for entry, value in config.fields():
        own = entry.metadata["bounds"].path or entry.name in ("prompt", "text_cache")
        if (value != defaults[entry.name] and not own) or entry.name in ALWAYS_TOLD:
            yield entry.name, public(value)


def public(value: Any) -> Any:
    """``value`` with paths cut to their last name: where files lie on somebody's machine is not published."""
    if isinstance(value, Mapping):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(inner) for inner in value]
    if isinstance(value, str) and "/" in value:
        is_path = value.startswith(("/", "~", ".")) or Path(value).exists()
        return Path(value).name if is_path else value
    return value


def _on_hub(weight: Weight) -> bool:
    return not weight.is_local and not weight.source.startswith("https://")


def _linked(weight: Weight) -> str:
    if not _on_hub(weight):
        return f"`{Path(weight.source).name}`"
    return f"[{weight.source}](https://huggingface.co/{weight.source.partition('@')[0]})"


def _usage(name: str, config: Config, base: Weight, diffusers_folders: Mapping[str, str]) -> Iterator[str]:
    """Sections with examples: in diffusers where it can, and in this project."""
    if diffusers_folders:
        yield "With diffusers:"
        yield f"```python\n{diffusers_example(name, config, base, diffusers_folders)}```"
    yield "With VADER, and the config CONFIG of the base model (`vader models` lists those that ship):"
    yield f"```sh\nhf download {name} --local-dir adapter\nvader sample CONFIG --adapter adapter\n```"
    if merged := config.models.base_adapters:
        yield f"The base was trained with `base_adapters = {public(merged)}` merged into it; load them beside this one."


def diffusers_example(name: str, config: Config, base: Weight, diffusers_folders: Mapping[str, str]) -> str:
    """A program that makes one video of the size that the adapter was trained on."""
    import diffusers

    family: Any = config.backbone
    pipeline, video = family.pipelines[0], config.video_spec
    arguments = {
        "height": video.height,
        "width": video.width,
        "num_frames": video.num_frames,
        "num_inference_steps": family.num_sampling_steps(config.family),
        "guidance_scale": config.flat()["guidance_scale"],
    }
    taken = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    source = base.source if _on_hub(base) else Path(base.source).name
    lines = [
        "import torch",
        f"from diffusers import {pipeline}",
        "from diffusers.utils import export_to_video",
        "",
        f'pipeline = {pipeline}.from_pretrained("{source}", dtype=torch.bfloat16)',
        *(_loading(config, name, expert, folder) for expert, folder in diffusers_folders.items()),
        'pipeline.to("cuda")',
        "video = pipeline(",
        '    "a fox runs through snow",',
        *(f"    {key}={value}," for key, value in arguments.items() if key in taken),
        ").frames[0]",
        f'export_to_video(video, "video.mp4", fps={round(config.video.file_fps)})',
    ]
    return "\n".join(lines) + "\n"


def _loading(config: Config, name: str, expert: str, folder: str) -> str:
    """The line that loads an adapter, of one expert where there are several."""
    import diffusers

    family: Any = config.backbone
    if not hasattr(getattr(diffusers, family.pipelines[0]), "load_lora_weights"):
        # Unless told to, this method leaves the metadata unread, and with them alpha.
        return f'pipeline.{family.diffusers_component}.load_lora_adapter("{name}", use_safetensors=True)'
    # Without the file's name diffusers would look for it in the subfolder of the subfolder.
    place = f', subfolder="{folder}", weight_name="{DIFFUSERS_WEIGHTS}"' if folder else ""
    second = ", load_into_transformer_2=True" if expert == "low_noise" else ""
    return f'pipeline.load_lora_weights("{name}"{place}{second})'


def _gain_table(gains: Sequence[Gain]) -> str:
    if not gains:
        return "Not measured."
    rows = [
        (
            gain.measure,
            gain.prompts,
            str(gain.videos),
            f"{gain.before:.4g}",
            f"{gain.after:.4g}",
            f"{gain.gain:+.3g} ({gain.low:+.3g} to {gain.high:+.3g})",
        )
        for gain in gains
    ]
    columns = ("measure", "prompts", "videos", "base", "adapter", "gain (95% interval)")
    how = "The same prompts and noise without and with the adapter; intervals are paired, by bootstrap over prompts."
    return f"{how}\n\n{_table(columns, rows)}"


def _reward_table(config: Config) -> str:
    weights = config.reward.reward_fn
    rows = [
        (
            f"`{public(name)}`",
            str(weights[name]) if isinstance(weights, Mapping) else "1",
            f"`{public(arguments)}`" if arguments else "",
        )
        for name, arguments in config.reward.parts.items()
    ]
    return _table(("reward", "weight", "arguments"), rows)


def _licence_table(config: Config, base: Weight) -> str:
    used = [(base, "base model")]
    used += [
        (weight, "reward") for weight in required_weights(config.reward.reward_fn, config.reward.arguments)
    ]
    rows = dict.fromkeys(
        (_linked(weight), use, weight.licence or "not known here: see where it comes from")
        for weight, use in used
    )
    return "The adapter changes the base model, whose licence applies to its use.\n\n" + _table(
        ("weights", "as", "licence"), list(rows)
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
