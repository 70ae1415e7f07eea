"""Frozen blocks that wait in the CPU's memory: the one that runs is on the device, and the next is on its way.

A block's weights are copied to the device when it is entered, in the forward pass, when it is recomputed, or when a
gradient reaches its output, and given up when another is. Autograd keeps views of weights, so that the tensors stay and
the block's storage alone comes and goes. diffusers' group offloading gives a block up at the end of its forward pass,
and so cannot be trained through.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from Core.modules.host_copy import copy_pieces, pieces_of

ALIGNMENT = 256  # bytes, as CUDA's allocator aligns a tensor


class StreamedBlock:
    """The weights of one block: in the CPU's memory, and together in one buffer on the device.

    Args:
        tensors: parameters and buffers, on the CPU; they lie on ``device`` from then on, at first without content.
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device):
        tensors = list(tensors)
        places = list(itertools.accumulate((_room(tensor) for tensor in tensors), initial=0))
        self.size = places[-1]
        whole = torch.empty(self.size, dtype=torch.uint8)
        self.buffer = torch.empty(self.size, dtype=torch.uint8, device=device)
        for tensor, place in zip(tensors, places, strict=False):
            _cut(whole, place, tensor).copy_(tensor.detach())
            tensor.data = _cut(self.buffer, place, tensor)
        self.pieces = pieces_of(whole, whole.device, pinned=device.type == "cuda")
        self.resident = True
        self.arrival: Any = None  # event at the end of a copy that nothing has waited for yet
        self.leave()

    def come(self, copying: Any) -> None:
        """Begin the copy to the device, on the stream ``copying`` where it has streams."""
        if self.resident:
            return
        self.resident = True
        # Allocated and, in ``leave``, freed on the current stream, which waits for the copy in between.
        self.buffer.untyped_storage().resize_(self.size)
        if copying is None:
            copy_pieces(self.pieces, self.buffer)
            return
        # Until what the memory was used for before is done.
        copying.wait_stream(torch.cuda.current_stream(self.buffer.device))
        with torch.cuda.stream(copying):
            copy_pieces(self.pieces, self.buffer)
            self.arrival = copying.record_event()

    def wait(self) -> None:
        """Have what the device does next wait for the copy."""
        if self.arrival is not None:
            torch.cuda.current_stream(self.buffer.device).wait_event(self.arrival)
            self.arrival = None

    def leave(self) -> None:
        self.wait()
        self.resident = False
        self.buffer.untyped_storage().resize_(0)


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _cut(buffer: Tensor, place: int, like: Tensor) -> Tensor:
    """The bytes of ``buffer`` from ``place`` on as a tensor of the shape and dtype of ``like``."""
    return buffer[place : place + like.nbytes].view(like.dtype).view(like.shape)


class BlockStream:
    """Streamed blocks, of which at most two are on the device: the last one entered, and the one expected next."""

    def __init__(self, blocks: Sequence[StreamedBlock], device: torch.device):
        self.blocks = blocks
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.current: int | None = None
        self.before: int | None = None
        # What came after two blocks in a row the last time: forward, backward, and from one call to the next.
        self.after: dict[tuple[int | None, int | None], int] = {}

    def resident(self) -> list[int]:
        return [number for number, block in enumerate(self.blocks) if block.resident]

    def enter(self, number: int) -> None:
        """Have block ``number`` on the device, and the one that will follow on its way."""
        if number == self.current:
            return
        self.after[self.before, self.current] = number
        self.before, self.current = self.current, number
        following = self.after.get((self.before, number))
        for other in self.resident():
            if other not in (number, following):
                self.blocks[other].leave()
        self.blocks[number].come(self.copying)
        self.blocks[number].wait()
        if following is not None:
            self.blocks[following].come(self.copying)


def stream(blocks: Sequence[nn.Module], device: torch.device, kept: Iterable[nn.Module] = ()) -> BlockStream:
    """Keep the weights of frozen ``blocks`` on the CPU, where they lie, and bring them to ``device`` as they run.

    What is attached to a block later, such as an adapter, is not streamed.

    Args:
        kept: modules whose weights are to stay on the device, since they run outside their block.
    """
    excluded = {id(tensor) for module in kept for tensor in _tensors(module)}
    streamed = [
        StreamedBlock((tensor for tensor in _tensors(block) if id(tensor) not in excluded), device)
        for block in blocks
    ]
    stream = BlockStream(streamed, device)
    for number, block in enumerate(blocks):
        _enter_with(block, stream, number)
    return stream


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _enter_with(block: nn.Module, stream: BlockStream, number: int) -> None:
    """Enter a block when its forward pass begins, also to recompute it, and when a gradient reaches its output."""

    def before(module: nn.Module, args: Any) -> None:
        stream.enter(number)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        reached = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if reached:
            register_multi_grad_hook(reached, lambda gradient: stream.enter(number), mode="any")

    # First of all hooks: what else runs before a block may read its weights.
    block.register_forward_pre_hook(before, prepend=True)
    block.register_forward_hook(after)
