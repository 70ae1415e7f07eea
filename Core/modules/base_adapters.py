"""Other people's adapters, such as a step distillation or a style, merged into the frozen denoiser."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from Core.modules import lora, sharding
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


@dataclass(frozen=True)
class Change:
    """What an adapter adds to a tensor.

    Attributes:
        delta: computes it in float32, shaped as ``shape`` or with its last axes flattened.
    """

    shape: tuple[int, ...]
    delta: Callable[[], Tensor]


def errors(
    entries: Sequence[str | Mapping[str, Any]],
    names: Mapping[str, str],
    experts: Sequence[str] = (),
    shapes: Mapping[str, Sequence[int]] = lora.NOTHING,
) -> list[str]:
    """Sentences on entries that are malformed, or name no readable adapter or one that does not fit.

    Args:
        names: the model family's table of original names.
        experts: of its denoisers.
        shapes: of the denoiser's weights; empty where they are not known.
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
        found += wrong or _reading_errors(key, BaseAdapter.of(entry), names, experts, shapes)
    return found


def _reading_errors(
    key: str,
    entry: BaseAdapter,
    names: Mapping[str, str],
    experts: Sequence[str],
    shapes: Mapping[str, Sequence[int]],
) -> list[str]:
    path = entry.path
    if fault := path_fault(path):
        return [f"{key}: {fault}"]
    if not Path(path).expanduser().exists():
        return [f"{key}: there is no file or folder {path!r}"]
    try:
        adapter = lora.read(path, names, differences=True)
    except (ValueError, OSError) as error:
        return [f"{key}: {error}"]
    mismatch = _mismatch(_changes(adapter, entry, shapes), shapes) if shapes else ""
    if not mismatch:
        return []
    several = any(name.startswith(tuple(f"{expert}." for expert in experts)) for name in shapes)
    advice = f"; set its expert to {' or '.join(map(repr, experts))}" if several and not entry.expert else ""
    return [f"{key}: the adapter {path!r} does not fit the model: {mismatch}{advice}"]


def merge(
    model: nn.Module, entries: Sequence[str | Mapping[str, Any]], names: Mapping[str, str] = lora.NOTHING
) -> None:
    """Add strength times what each entry changes to ``model``, in place, summed in float32.

    That is alpha / rank · B A of a layer's weight, and differences of whole tensors as they are.

    Raises:
        ValueError: an adapter was made for another model; the message lists what differs.
    """
    own = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in own.items()}
    for entry in map(BaseAdapter.of, entries):
        changes = _changes(lora.read(entry.path, names, differences=True), entry, shapes)
        if mismatch := _mismatch(changes, shapes):
            raise ValueError(f"base_adapters: the adapter {entry.path} does not fit the model: {mismatch}")
        for name, parts in changes.items():
            weight = own[name].data
            total = sum(part.delta().view(weight.shape) for part in parts)
            held, change = sharding.own_part(weight, total)
            held.copy_(held.float() + entry.strength * change.to(held.device))


def _changes(
    adapter: lora.Adapter, entry: BaseAdapter, shapes: Mapping[str, Sequence[int]]
) -> dict[str, list[Change]]:
    """What an adapter adds, by the name of the tensor in the whole denoiser."""
    prefix = f"{entry.expert}." if entry.expert else ""
    changes: dict[str, list[Change]] = {}
    for name, shape in lora.layer_shapes(adapter).items():
        changes[f"{prefix}{name}.weight"] = [Change(shape, adapter.layers[name].delta)]
    for name, difference in adapter.differences.items():
        whole = f"{prefix}{name}"  # of a tensor that no layer has, or else of a layer's weight
        found = whole if whole in shapes or whole.endswith(".bias") else f"{whole}.weight"
        changes.setdefault(found, []).append(Change(tuple(difference.shape), difference.float))
    return changes


def _mismatch(changes: Mapping[str, list[Change]], shapes: Mapping[str, Sequence[int]]) -> str:
    """What of an adapter the denoiser has no tensor for, or one of another size; empty where it fits."""
    differing = {
        name: (part.shape, shapes[name])
        for name, parts in changes.items()
        for part in parts
        if name in shapes and part.shape not in (tuple(shapes[name]), _as_matrix(shapes[name]))
    }
    return describe_mismatch([], changes.keys() - shapes.keys(), differing)


def _as_matrix(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a convolution's weight [out, in, *k] as [out, in · k], in which factors may come."""
    return (*shape[:1], math.prod(shape[1:]))
