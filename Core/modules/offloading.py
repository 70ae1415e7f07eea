"""What a network keeps for its backward pass, in the CPU's memory until then.

With checkpointing that is the input of every block, which is read once, much later: the copies take a small part of the
time in which the block is recomputed. ``torch.autograd.graph.save_on_cpu`` would copy what blocks share once for each.
"""

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from Core.modules.host_copy import copy_pieces, pieces_of

SMALL = 1 << 20  # bytes of a tensor that stays where it is


class OffloadedTensor:
    """A tensor's copy on another device; each place that saved the tensor holds it.

    A tensor that several blocks save comes back once. It stays until the last of them has had its backward pass, as it
    would without offloading.
    """

    def __init__(self, tensor: Tensor, offload_device: torch.device):
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.pieces = pieces_of(tensor, offload_device, pinned=tensor.is_cuda)
        self.shared = False
        self.returned: Tensor | None = None

    def load(self) -> Tensor:
        if self.returned is not None:
            return self.returned
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        copy_pieces(self.pieces, tensor)
        if self.shared:
            self.returned = tensor
        return tensor


class Offload:
    """Hooks of one forward pass: what is saved goes to ``offload_device``, and comes back where it is asked for.

    Args:
        weights: stay where they are, since the device holds them anyway.
    """

    def __init__(self, offload_device: torch.device, weights: Iterable[Tensor] = ()):
        self.offload_device = offload_device
        self.weights = weakref.WeakSet(weight.untyped_storage() for weight in weights)
        # Of each storage, while it is alive: (version, view) → its copy.
        self.copies: weakref.WeakKeyDictionary[Any, dict[Any, OffloadedTensor]] = weakref.WeakKeyDictionary()

    def pack(self, tensor: Tensor) -> Tensor | OffloadedTensor:
        storage = tensor.untyped_storage()
        if tensor.nbytes < SMALL or storage in self.weights:
            return tensor
        known = self.copies.setdefault(storage, {})
        view = tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        if view in known:
            known[view].shared = True
        else:
            known[view] = OffloadedTensor(tensor, self.offload_device)
        return known[view]

    def unpack(self, packed: Tensor | OffloadedTensor) -> Tensor:
        return packed.load() if isinstance(packed, OffloadedTensor) else packed

    def close(self) -> None:
        """Hold no copy any longer: autograd keeps these hooks, and a storage may outlive what was saved of it."""
        self.copies.clear()


def offload_activations(network: nn.Module, offload_device: torch.device) -> None:
    """Let the forward passes of ``network`` with a gradient keep on ``offload_device`` what their backward pass reads.

    Within what is checkpointed that is its inputs. The network's weights stay where they are.
    """
    forward = network.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        offload = Offload(offload_device, network.parameters())
        try:
            with saved_tensors_hooks(offload.pack, offload.unpack):
                return forward(*args, **kwargs)
        finally:
            offload.close()

    network.forward = run
