"""LoRA files of other programs, to and from one form: a layer's name in diffusers → its factors and alpha.

| format | key of a factor | scaling |
| --- | --- | --- |
| PEFT | ``base_model.model.<name>.lora_A.weight`` | ``adapter_config.json`` |
| diffusers | ``<component>.<name>.lora_A.weight`` | the file's metadata ``lora_adapter_metadata`` |
| ComfyUI | ``diffusion_model.<original name>.lora_A.weight`` or ``lora_down`` | ``.alpha``; written folded into B |
| kohya, musubi | ``lora_unet_<original name with underscores>.lora_down.weight`` | ``.alpha`` |

A model family (``Core.backbones.base.Backbone``) states two class attributes for them: ``original_names``, a table of
``Core.modules.lora_names``, for ComfyUI and kohya; and ``diffusers_component``, the part of diffusers' pipeline that
holds the denoiser ("transformer"), for diffusers. Without them those formats are refused for it. One whose denoiser
holds several, such as a high-noise and a low-noise one, names them in ``experts``: other programs have a file for each.

Beside factors a file may hold changes of whole tensors, as step distillations do for norms, biases and modulations:
``<name>.diff`` of a layer's weight or of a tensor that has no layer, ``<name>.diff_b`` of its bias, and
``<block>.diff_m`` of a block's ``modulation``, each to be added as it is. They have no rank, so they can be merged but
not trained on.

Axes: r rank, k the kernel of a convolution, absent in a linear layer.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from Core.modules import lora_names

PEFT_PREFIX = "base_model.model."
COMFYUI_PREFIX = "diffusion_model."
KOHYA_PREFIX = "lora_unet_"
OWN_PREFIXES = ("transformer.", "unet.")  # diffusers' own names follow
PREFIXES = (PEFT_PREFIX, COMFYUI_PREFIX, KOHYA_PREFIX, *OWN_PREFIXES)
REFERENCE_ALPHA = 8  # PEFT's default, which the reference implementation left as it was
METADATA = "lora_adapter_metadata"  # where diffusers writes PEFT's settings
FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up|alpha)(\.default)?(\.weight)?")
DIFFERENCE = re.compile(r"(.+)\.diff(_b|_m)?")
PARTS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}
# What a key that is no factor of plain LoRA tells of a file: pattern → kind.
OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"lokr_": "LoKr",
    r"hada_": "LoHa",
    r"oft_": "OFT",
    r"lora_mid": "LoCon with a Tucker decomposition",
    r"lora_[AB]\.bias": "trained biases",
    r"^lora_te|^text_encoder": "an adapter of the text encoder",
}

T = TypeVar("T")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LoraLayer:
    """What an adapter adds to one layer: W + alpha / r · up down.

    Attributes:
        down: A, [r, in, *k].
        up: B, [out, r, *1].
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def in_float32(self) -> "LoraLayer":
        return LoraLayer(self.down.float(), self.up.float(), self.alpha)

    def with_whole_alpha(self) -> "LoraLayer":
        """The same with an alpha that ``lora_alpha`` can be: a whole number above zero."""
        return self if self.alpha > 0 and float(self.alpha).is_integer() else self.folded()

    def folded(self) -> "LoraLayer":
        """The same with alpha = r, so that readers without alpha scale it rightly."""
        return LoraLayer(self.down, self.up * (self.alpha / self.rank), self.rank)

    def delta(self) -> Tensor:
        """alpha / r · B A, [out, in · k], float32."""
        return self.alpha / self.rank * (self.up.float().flatten(1) @ self.down.float().flatten(1))


Layers = dict[str, LoraLayer]


# Reading


def read_layers(state: Mapping[str, Tensor], settings: Mapping[str, Any], names: Mapping[str, str]) -> Layers:
    """The layers of a file in any of the formats, which its keys tell.

    Args:
        settings: PEFT's, from beside or inside the file; of these ``lora_alpha`` and ``alpha_pattern`` count.
        names: the family's table of original names.

    Raises:
        ValueError: it holds anything but plain LoRA, or layers the table lacks; the message continues "<file> …".
    """
    prefix = _prefix(state)
    parts: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, value in state.items():
        match = FACTOR.fullmatch(key.removeprefix(prefix))
        if match and key.startswith(prefix):
            parts.setdefault(match[1], {})[PARTS[match[2]]] = value
        else:
            foreign.append(key)
    _refuse_other_kinds(state, foreign, parts)
    own_name = _namer(prefix, names)
    alpha_of = _alphas(settings, REFERENCE_ALPHA if prefix == PEFT_PREFIX else None)
    named = {own_name(name): part for name, part in parts.items()}
    return {
        name: LoraLayer(
            part["down"],
            part["up"],
            float(part["alpha"]) if "alpha" in part else alpha_of(name, len(part["down"])),
        )
        for name, part in named.items()
    }


def split_differences(state: Mapping[str, Tensor], names: Mapping[str, str]) -> tuple[Tensors, Tensors]:
    """The other tensors of a file, and its changes of whole tensors.

    Args:
        names: the family's table of original names.

    Returns:
        the others by their keys; the changes by diffusers' name of the layer or tensor, ``.bias`` after it where the
        bias is meant.

    Raises:
        ValueError: a change of a layer that the table lacks; the message continues "<file> …".
    """
    prefix = _prefix(state)
    found = {key: match for key in state if (match := DIFFERENCE.fullmatch(key.removeprefix(prefix)))}
    others = {key: value for key, value in state.items() if key not in found}
    if not found:
        return others, {}
    own_name, dot = _namer(prefix, names), "_" if prefix == KOHYA_PREFIX else "."
    endings = {None: ("", ""), "_b": ("", ".bias"), "_m": (f"{dot}modulation", "")}
    differences = {}
    for key, match in found.items():
        inside, after = endings[match[2]]
        differences[own_name(match[1] + inside) + after] = state[key]
    return others, differences


def _prefix(state: Mapping[str, Tensor]) -> str:
    """What a format puts before a layer's name."""
    return next((p for p in PREFIXES if any(key.startswith(p) for key in state)), "")


def _refuse_other_kinds(state: Mapping[str, Tensor], foreign: list[str], parts: Mapping[str, dict]) -> None:
    """Raise ValueError where a file holds more, or less, than pairs of factors."""
    for pattern, kind in OTHER_KINDS.items():
        if found := [key for key in foreign if re.search(pattern, key)]:
            raise ValueError(
                f"holds {kind}, which is not supported: {len(found)} keys such as {found[0]!r}; give a plain LoRA "
                "adapter, or merge it into its model and give the result as the model"
            )
    if not parts or not all(map(_is_pair, parts.values())):
        downs = sum("down" in part for part in parts.values())
        raise ValueError(f"is no LoRA adapter: it holds {len(state)} tensors, {downs} of them lora_A")
    if foreign:
        raise ValueError(
            f"holds {len(foreign)} keys beside one denoiser's adapter, such as {foreign[0]!r}; "
            "give a file with that adapter alone"
        )


def _is_pair(part: Mapping[str, Tensor]) -> bool:
    """Whether both factors are there and have one rank."""
    if not {"down", "up"} <= part.keys() or min(part["down"].ndim, part["up"].ndim) < 2:
        return False
    return part["up"].shape[1] == part["down"].shape[0]


def _namer(prefix: str, names: Mapping[str, str]) -> Callable[[str], str]:
    """From a layer's name in a file to diffusers'."""
    if prefix in (COMFYUI_PREFIX, KOHYA_PREFIX) and not names:
        raise ValueError(
            f"goes by the original names of layers (its keys begin with {prefix!r}), which are not known of this "
            "model family; give a file of PEFT or diffusers"
        )
    if prefix == KOHYA_PREFIX:
        return lambda name: lora_names.from_flat(name, names)
    if prefix == PEFT_PREFIX or prefix in OWN_PREFIXES:
        return lambda name: name
    return lambda name: lora_names.from_original(name, names)


def _alphas(settings: Mapping[str, Any], default: float | None) -> Callable[[str, int], float]:
    """Alpha of a layer by its name and rank: PEFT's pattern for it, or ``lora_alpha``, or the default, None being r."""
    # As PEFT matches them; compiled here, since there may be one for each of hundreds of layers.
    patterns = {
        re.compile(rf"(.*\.)?({key})$"): alpha for key, alpha in (settings.get("alpha_pattern") or {}).items()
    }
    common_alpha = settings.get("lora_alpha", default)

    def alpha_of(name: str, rank: int) -> float:
        matching = (alpha for pattern, alpha in patterns.items() if pattern.match(name))
        alpha = next(matching, common_alpha)
        return float(rank if alpha is None else alpha)

    return alpha_of


def settings_in(metadata: str) -> dict[str, Any]:
    """PEFT's settings from the JSON that diffusers writes, whose keys begin with the component's name.

    Raises:
        ValueError: it is no JSON.
    """
    return {key.rpartition(".")[2]: value for key, value in json.loads(metadata).items()}


# Writing


def common(values: Iterable[T]) -> T:
    """The value that most layers have; the others' become a pattern."""
    return Counter(values).most_common(1)[0][0]


def by_expert(layers: Layers, experts: Iterable[str]) -> dict[str, Layers]:
    """The layers of each expert by their names within it; all under "" where the denoiser is one network.

    Args:
        experts: names of the denoiser's parts that other programs take for denoisers of their own.
    """
    split = {
        expert: {
            n.removeprefix(f"{expert}."): layer for n, layer in layers.items() if n.startswith(f"{expert}.")
        }
        for expert in experts
    }
    return {expert: own for expert, own in split.items() if own} or {"": layers}


def to_diffusers(layers: Layers, component: str) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of ``pytorch_lora_weights.safetensors``, as diffusers' ``load_lora_weights`` reads them."""
    rank = common(layer.rank for layer in layers.values())
    alpha = common(layer.alpha for layer in layers.values())
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {f"^{name}": layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        "target_modules": sorted(layers),
    }
    named = {f"{component}.{key}": value for key, value in settings.items()}
    metadata = {"format": "pt", METADATA: json.dumps(named, indent=2, sort_keys=True)}
    state: Tensors = {}
    for name, layer in layers.items():
        state |= _pair(f"{component}.{name}", layer, "lora_A", "lora_B")
    return state, metadata


def to_comfyui(layers: Layers, names: Mapping[str, str]) -> Tensors:
    """Tensors as ComfyUI reads them; alpha is folded into B, since it ignores metadata and others ignore ``.alpha``."""
    state: Tensors = {}
    for name, layer in layers.items():
        original = lora_names.to_original(name, names)
        state |= _pair(f"{COMFYUI_PREFIX}{original}", layer.folded(), "lora_A", "lora_B")
    return state


def to_kohya(layers: Layers, names: Mapping[str, str]) -> Tensors:
    """Tensors as kohya's and musubi's programs write and read them."""
    state: Tensors = {}
    for name, layer in layers.items():
        flat = KOHYA_PREFIX + lora_names.to_original(name, names).replace(".", "_")
        state |= _pair(flat, layer, "lora_down", "lora_up")
        state[f"{flat}.alpha"] = torch.tensor(float(layer.alpha))
    return state


def _pair(name: str, layer: LoraLayer, down: str, up: str) -> Tensors:
    return {f"{name}.{down}.weight": layer.down.contiguous(), f"{name}.{up}.weight": layer.up.contiguous()}
