"""What upstream's own ``opensora`` package needs, where it stands in for the one here.

Upstream's networks are transformers' models. They are filled here rather than by ``from_pretrained``: upstream's tag
v1.2.0 takes local folders for something else, and transformers 5 asks for a ``post_init`` that they do not call.
"""

import importlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from Core.utils.hub import Weight, locate, missing_local
from Core.utils.state_dict import fill_strictly
from opensora.acceleration.checkpoint import set_grad_checkpoint

# What `OpenSoraVAE_V1_2` builds its image half of, whatever weights follow.
IMAGE_VAE = Weight(source="PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", kind="file")
IMAGE_VAE_FILES = ("vae/config.json", "vae/diffusion_pytorch_model.safetensors")
WEIGHTS = "from_pretrained"
# Ours to handle: upstream's tag v1.2.0 knows no `force_huggingface`.
OWN_KEYS = (WEIGHTS, "force_huggingface")


def is_upstream() -> bool:
    """Whether ``opensora`` is upstream's package, by a key that only the one here takes."""
    return "keep_attention" not in inspect.signature(set_grad_checkpoint).parameters


def errors(weights: Iterable[Weight]) -> list[str]:
    """Sentences on what would stop upstream's package; brings its image VAE to this machine.

    Args:
        weights: of the denoiser and the VAE.
    """
    found = [problem for weight in weights if (problem := _folder_problem(weight))]
    try:
        importlib.import_module("opensora.models")
    except ImportError as error:
        found.append(
            f"upstream's opensora cannot be imported ({error}); see docs/onto-upstream.md for what it needs"
        )
    try:
        _fetch_image_vae()
    except FileNotFoundError as error:
        found.append(
            f"vae: upstream's VAE is built of {IMAGE_VAE.source} (subfolder vae), which must be in the hub's cache: "
            f"{error}"
        )
    return found


def _folder_problem(weight: Weight) -> str:
    path = Path(weight.source).expanduser()
    return missing_local(weight) if path.is_dir() else ""


def _fetch_image_vae() -> None:
    for file in IMAGE_VAE_FILES:
        locate(IMAGE_VAE.named(file))


def admit(folder: Path) -> None:
    """Let upstream's T5 read a folder; where it lists the sources that it takes, that is the hub id alone."""
    from opensora.models.text_encoder.t5 import T5Embedder

    embedder: Any = T5Embedder
    listed = getattr(embedder, "available_models", None)
    if listed is not None and str(folder) not in listed:
        embedder.available_models = [*listed, str(folder)]


def load_denoiser(entry: Mapping[str, Any], weight: Weight, **sizes: Any) -> nn.Module:
    """STDiT3 of the sizes in the folder's ``config.json``, overridden by the entry and ``sizes``."""
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config
    from opensora.registry import MODELS, build_module

    path, own = _path(weight), _without(entry, OWN_KEYS) | sizes
    if not path.is_dir():
        return fill_strictly(build_module(own, MODELS), path)
    config_class: Any = STDiT3Config  # transformers', there
    return fill_strictly(STDiT3(config_class.from_pretrained(path, **_without(own, ("type",)))), path)


def load_vae(entry: Mapping[str, Any], weight: Weight) -> nn.Module:
    from opensora import models as _models  # noqa: F401 (registers the networks)
    from opensora.registry import MODELS, build_module

    _fetch_image_vae()
    own = _without(entry, OWN_KEYS) | {"local_files_only": True}
    return fill_strictly(build_module(own, MODELS), _path(weight))


def _path(weight: Weight) -> Path:
    path = Path(weight.source).expanduser()
    return path if path.is_file() else locate(weight)


def _without(entry: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}
