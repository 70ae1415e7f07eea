"""What a network keeps for its backward pass, in the CPU's memory until then.

With checkpointing that is the input of every block, which is read once, much later: the copies take a small part of the
time in which the block is recomputed. ``torch.autograd.graph.save_on_cpu`` would copy what blocks share once for each.
"""

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALL = 1 << 20  # bytes of a tensor that stays where it is


class Offload:
    """Hooks of one forward pass: what is saved goes to ``home``, and comes back where it is asked for."""

    def __init__(self, home: torch.device):
        self.home = home
        # By storage, while that is alive: (version, view) → its copy.
        self.copies: dict[int, dict[Any, Tensor]] = {}

    def pack(self, tensor: Tensor) -> Any:
        if tensor.nbytes < SMALL:
            return tensor
        storage = tensor.untyped_storage()
        if id(storage) not in self.copies:
            self.copies[id(storage)] = {}
            weakref.finalize(storage, self.copies.pop, id(storage))
        known = self.copies[id(storage)]
        view = tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        if view not in known:
            known[view] = self._copy(tensor)
        return known[view], tensor.device

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        copy, device = packed
        return copy.to(device, non_blocking=True)

    def _copy(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor.to(self.home, copy=True)
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.home, pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)


def offload_activations(network: nn.Module, home: torch.device) -> None:
    """Let the forward passes of ``network`` that have a gradient keep at ``home`` what their backward pass will read.

    Within what is checkpointed that is its inputs. Weights that a backward pass reads outside of it are copied too.
    """
    forward = network.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        offload = Offload(home)
        with saved_tensors_hooks(offload.pack, offload.unpack):
            return forward(*args, **kwargs)

    network.forward = run
