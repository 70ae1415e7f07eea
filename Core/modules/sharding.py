"""Frozen networks split over the processes of a run: each holds some rows of every weight, and gathers a block's for
as long as it runs.

FSDP2 (``torch.distributed.fsdp.fully_shard``) does it. An adapter that is attached afterwards is no part of it: it
stays whole on every process. Gathering takes all processes, so that each must run the network as often as the others.
"""

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from Core.utils.state_dict import describe_mismatch

# A module, and its method that is called from outside beside ``forward``, if any.
Part = tuple[nn.Module, str]


def groups(network: nn.Module, parts: Iterable[Part]) -> dict[nn.Module, list[str]]:
    """What ``shard`` gathers together: each module of ``parts`` with the names of its own weights, the rest last.

    Args:
        parts: of ``network``, inner ones before those around them; see ``shard``.
    """
    modules = dict.fromkeys([module for module, _ in parts if module is not network] + [network])
    taken: set[nn.Parameter] = set()
    found: dict[nn.Module, list[str]] = {}
    for module in modules:
        within = set(module.parameters()) - taken
        found[module] = [name for name, p in network.named_parameters() if p in within]
        taken |= within
    return found


def shard(network: nn.Module, parts: Sequence[Part], mesh: Any) -> None:
    """Split every parameter of ``network`` over the processes of ``mesh``, by rows.

    Args:
        network: frozen; its parameters may be on the meta device, and are filled by ``fill`` then.
        parts: modules that are gathered by themselves, inner ones first; what they leave is gathered while ``network``
            runs. A part's method is one that is called from outside as ``forward`` is.
        mesh: one-dimensional.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # What a network returns may be a view of its last result, which nothing here changes in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    network.requires_grad_(False)
    for module in groups(network, parts):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module, method in parts:
        if method:
            register_fsdp_forward_method(module, method)


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's own parameters are split over processes."""
    return getattr(module, "_is_fsdp_managed_module", False)


def raised_anywhere(flags: Tensor) -> Tensor:
    """Whether each of the flags [N] is raised on some process; all call it together."""
    raised = flags.to(torch.uint8)
    torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX)
    return raised.bool()


def held_bytes(network: nn.Module) -> int:
    """Bytes of the frozen weights of ``network`` that this process holds while it does not run."""
    tensors = [p for p in network.parameters() if not p.requires_grad] + list(network.buffers())
    return sum(_local(tensor).nbytes for tensor in tensors)


def own_part(weight: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Of a weight and a tensor of its shape the rows that this process holds; of a weight that is not split, both."""
    local = _local(weight)
    return local, whole if local is weight else whole[_own_rows(weight)]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within this context new networks have buffers, and parameters without memory."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def fill(network: nn.Module, files: Sequence[Path], device: torch.device) -> None:
    """Read this process's rows of every parameter, and every buffer, of a network that ``shard`` split on meta.

    Args:
        files: safetensors files, which together hold the network's weights by name.

    Raises:
        ValueError: weights are missing or of another shape; the message names them.
    """
    own = network.state_dict()
    places: dict[str, Path] = {}
    shapes: dict[str, Sequence[int]] = {}
    for file in files:
        with safe_open(file, "pt") as content:
            for name in own.keys() & set(content.keys()):
                places[name], shapes[name] = file, content.get_slice(name).get_shape()
    differing = {k: (shapes[k], own[k].shape) for k in places if list(shapes[k]) != list(own[k].shape)}
    if mismatch := describe_mismatch(own.keys() - places.keys(), [], differing):
        raise ValueError(
            f"the weights in {files[0].parent} are not those of {type(network).__name__}: {mismatch}"
        )
    by_file = itertools.groupby(sorted(places, key=lambda name: places[name]), key=lambda name: places[name])
    for file, names in by_file:
        with safe_open(file, "pt") as content:
            for name in names:
                _fill_one(network, name, own[name], content.get_slice(name), device)


def _fill_one(network: nn.Module, name: str, wanted: Tensor, stored: Any, device: torch.device) -> None:
    """Set one parameter or buffer from a slice of a file."""
    path, _, attribute = name.rpartition(".")
    owner = network.get_submodule(path)
    if attribute not in owner._parameters:
        owner._buffers[attribute] = stored[...].to(device, wanted.dtype)
        return
    filled = torch.empty_like(wanted, device=device)
    _local(filled).copy_(stored[_own_rows(wanted)])
    owner._parameters[attribute] = nn.Parameter(filled, requires_grad=False)


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _own_rows(weight: Any) -> slice:
    """The rows that this process holds of a split weight; FSDP gives each process as many, the last ones fewer."""
    rows, size = weight.shape[0], weight.device_mesh.size()
    most = -(-rows // size)
    first = min(rows, most * weight.device_mesh.get_local_rank())
    return slice(first, min(rows, first + most))
