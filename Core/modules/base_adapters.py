"""Other people's adapters, such as a step distillation or a style, merged into the frozen denoiser."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from Core.modules import lora, sharding
from Core.modules.lora_formats import Layers
from Core.utils.files import path_fault
from Core.utils.options import check_values, option
from Core.utils.state_dict import describe_mismatch


@dataclass(frozen=True, kw_only=True)
class BaseAdapter:
    """An entry of ``base_adapters``."""

    path: str = option("", "the adapter, in any format that lora_ckpt_path takes")
    strength: float = option(1.0, "factor on alpha / rank")
    expert: str = option("", "the expert it is of, where the denoiser holds several")

    @classmethod
    def of(cls, entry: str | Mapping[str, Any]) -> "BaseAdapter":
        return cls(path=entry) if isinstance(entry, str) else cls(**entry)


def errors(
    entries: Sequence[str | Mapping[str, Any]], names: Mapping[str, str], experts: Sequence[str] = ()
) -> list[str]:
    """Sentences on entries that are malformed or name no readable adapter.

    Args:
        names: the model family's table of original names.
        experts: of its denoisers.
    """
    fields = {entry.name: entry for entry in dataclasses.fields(BaseAdapter)}
    found = []
    for number, entry in enumerate(entries):
        key = f"base_adapters[{number}]"
        given = {"path": entry} if isinstance(entry, str) else entry
        wrong = check_values(fields, given, f"{key}.")
        if "path" not in given:
            wrong.append(f"{key} has no path; give dict(path=…, strength=1.0) or the path alone")
        if not wrong and given.get("expert") and given["expert"] not in experts:
            known = f"choose one of {', '.join(experts)}" if experts else "this family has none; remove it"
            wrong.append(f"{key}.expert: there is no expert {given['expert']!r}; {known}")
        found += wrong or _reading_errors(key, given["path"], names)
    return found


def _reading_errors(key: str, path: str, names: Mapping[str, str]) -> list[str]:
    if fault := path_fault(path):
        return [f"{key}: {fault}"]
    if not Path(path).expanduser().exists():
        return [f"{key}: there is no file or folder {path!r}"]
    try:
        lora.read(path, names)
    except (ValueError, OSError) as error:
        return [f"{key}: {error}"]
    return []


def merge(
    model: nn.Module, entries: Sequence[str | Mapping[str, Any]], names: Mapping[str, str] = lora.NOTHING
) -> None:
    """Add strength · alpha / rank · B A of each entry to the weights of ``model``, in place, summed in float32.

    Raises:
        ValueError: an adapter was made for another model; the message lists what differs.
    """
    for entry in map(BaseAdapter.of, entries):
        prefix = f"{entry.expert}." if entry.expert else ""
        layers = {prefix + name: layer for name, layer in lora.read(entry.path, names).layers.items()}
        weights = _weights(model, layers, entry.path)
        for name, weight in weights.items():
            held, delta = sharding.own_part(weight.data, layers[name].delta().view(weight.shape))
            held.copy_(held.float() + entry.strength * delta.to(held.device))


def _weights(model: nn.Module, layers: Layers, source: str) -> dict[str, Tensor]:
    """The weight of each layer that an adapter changes."""
    own = {name: module.weight for name, module in model.named_modules() if isinstance(module, lora.ADAPTED)}
    weights = {name: own[name] for name in layers.keys() & own.keys()}
    shapes = {
        name: (torch.Size((layers[name].up.shape[0], layers[name].down[0].numel())), weight.flatten(1).shape)
        for name, weight in weights.items()
    }
    differing = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    if mismatch := describe_mismatch([], layers.keys() - own.keys(), differing):
        raise ValueError(f"base_adapters: the adapter {source} does not fit the model: {mismatch}")
    return weights
