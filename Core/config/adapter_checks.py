"""Sentences on adapters and on the layers they adapt, from the files alone: nothing is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from Core.modules import lora
from Core.utils.state_dict import describe_mismatch

from .schema import BASE, Config


def adapter_errors(config: Config) -> list[str]:
    """What is wrong with ``lora_ckpt_path`` and ``lora_targets``."""
    given = config.adapter.lora_ckpt_path or []
    paths = [path for path in ([given] if isinstance(given, str) else given) if path != BASE]
    errors = _training_errors(config, given) if config.run.is_vader_training else []
    shapes: Mapping[str, Sequence[int]] = {}
    if paths or config.adapter.lora_targets:
        shapes = config.denoiser_shapes
    errors += _target_errors(config.adapter.lora_targets or [], shapes)
    return errors + [error for path in paths for error in _file_errors(config, path, shapes)]


def _training_errors(config: Config, given: str | list[str]) -> list[str]:
    if isinstance(given, list):
        return [f"lora_ckpt_path must be one adapter in training, got {given!r}"] if given else []
    if given != BASE:
        return []
    return [
        f"lora_ckpt_path={BASE!r} is for inference; training starts from the model as it is without it, remove it"
    ]


def _target_errors(targets: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Targets that name no layer of the denoiser, where its weights are here to tell."""
    names = {key.removesuffix(".weight") for key, shape in shapes.items() if key.endswith(".weight")}
    adaptable = sorted(name for name in names if len(shapes[f"{name}.weight"]) > 1)
    return [error for target in targets if adaptable and (error := lora.target_error(target, adaptable))]


def _file_errors(config: Config, path: str, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Whether an adapter can be read, fits the model, and may be trained on with the settings it has."""
    if not Path(path).expanduser().exists():
        return [f"lora_ckpt_path: there is no file or folder {path!r}"]
    try:
        adapter = lora.read(path, config.backbone.original_names)
    except (ValueError, OSError) as error:
        return [f"lora_ckpt_path: {error}"]
    if mismatch := misfit(adapter, shapes):
        return [f"lora_ckpt_path: the adapter {path!r} does not fit the model: {mismatch}"]
    return _differences(config, path, adapter) if config.run.is_vader_training else []


def misfit(adapter: lora.Adapter, shapes: Mapping[str, Sequence[int]]) -> str:
    """What of an adapter the denoiser has no layer for, or one of another size; empty where nothing is known."""
    if not shapes:
        return ""
    unknown, differing = [], {}
    for layer, found in lora.layer_shapes(adapter).items():
        if f"{layer}.weight" not in shapes:
            unknown.append(layer)
        elif tuple(shapes[f"{layer}.weight"]) != found:
            differing[layer] = (found, shapes[f"{layer}.weight"])
    return describe_mismatch([], unknown, differing)


def _differences(config: Config, path: str, adapter: lora.Adapter) -> list[str]:
    """What an adapter that is trained on would keep, though the configuration says otherwise."""
    own: dict[str, object] = {"lora_rank": adapter.rank, "lora_alpha": adapter.alpha}
    given: dict[str, object] = {
        "lora_rank": config.adapter.lora_rank,
        "lora_alpha": config.adapter.lora_alpha,
    }
    targets = config.adapter.lora_targets
    # A target may be longer than a layer's own name; that both mean the same layers shows when they are attached.
    layers = {layer.rpartition(".")[2] for layer in adapter.layers}
    if targets and layers != {target.rpartition(".")[2] for target in targets}:
        own["lora_targets"], given["lora_targets"] = sorted(layers), list(targets)
    differing = [key for key in own if own[key] != given[key]]
    if not differing:
        return []
    has = " and ".join(f"{key}={own[key]}" for key in differing)
    asked = " and ".join(f"{key}={given[key]}" for key in differing)
    return [
        f"lora_ckpt_path: the adapter {path!r} has {has}, but the configuration has {asked}; a loaded adapter keeps "
        f"its rank, alpha and targets, so set {has}"
    ]
