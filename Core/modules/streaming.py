"""Frozen blocks that wait in the CPU's memory: the one that runs is on the device, and the next is on its way.

A block's weights are copied to the device when it is entered, in the forward pass, when it is recomputed, or when a
gradient reaches its output, and given up when another is. Autograd keeps views of weights, so that the tensors stay and
their storage alone comes and goes. diffusers' group offloading gives a block up at the end of its forward pass, and so
cannot be trained through.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves


class StreamedBlock:
    """The weights of one block, at home on the CPU.

    Args:
        tensors: parameters and buffers, on the CPU; they lie on ``device`` from then on, at first without content.
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device):
        self.device = device
        self.pairs: list[tuple[Tensor, Tensor]] = []  # at home, on the device
        for tensor in tensors:
            home = tensor.data.contiguous()
            placed = torch.empty_like(home, device=device)
            self.pairs.append((home.pin_memory() if device.type == "cuda" else home, placed))
            tensor.data = placed
        self.resident = True
        self.arrival: Any = None  # event at the end of a copy that nothing has waited for yet
        self.leave()

    def come(self, copying: Any) -> None:
        """Begin the copy to the device, on the stream ``copying`` where it has streams."""
        if self.resident:
            return
        self.resident = True
        for home, placed in self.pairs:
            placed.untyped_storage().resize_(home.nbytes)
        if copying is None:
            self._copy()
            return
        copying.wait_stream(torch.cuda.current_stream(self.device))  # what the memory was used for before
        with torch.cuda.stream(copying):
            self._copy()
            self.arrival = copying.record_event()

    def _copy(self) -> None:
        for home, placed in self.pairs:
            placed.copy_(home, non_blocking=True)

    def wait(self) -> None:
        """Have what the device does next wait for the copy."""
        if self.arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrival)
            self.arrival = None

    def leave(self) -> None:
        self.wait()
        self.resident = False
        for _, placed in self.pairs:
            placed.untyped_storage().resize_(0)


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
