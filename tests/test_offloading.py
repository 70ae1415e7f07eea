"""Activations that wait in the CPU's memory: the same gradient, and nothing kept on the device."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from Core.estimate.live_bytes import LiveBytes
from Core.estimate.values import tensors_without_content
from Core.modules import host_copy, offloading
from Core.modules.offloading import Offload, OffloadedTensor, offload_activations


class Blocks(nn.Module):
    """Checkpointed blocks that share one of their inputs."""

    def __init__(self, count: int = 4):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(count))

    def forward(self, x, shared):
        for block in self.blocks:
            x = checkpoint(lambda x, s, block=block: block(x).tanh() * s, x, shared, use_reentrant=False)
        return x


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(offloading, "SMALL", 1)


def gradients(network, offloaded: bool):
    if offloaded:
        offload_activations(network, torch.device("cpu"))
    x, shared = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(1)).requires_grad_().unbind()
    network(x, shared).square().sum().backward()
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    return found


def test_the_gradient_is_the_same(small):
    network = Blocks()
    assert all(map(torch.equal, gradients(network, False), gradients(network, True)))


def test_what_blocks_share_is_copied_once_and_what_takes_its_place_is_copied_anew(small):
    offload = Offload(torch.device("cpu"))
    shared = torch.ones(8)
    first, second = offload.pack(shared), offload.pack(shared.view(2, 4).view(8))
    assert first is second
    shared += 1
    assert torch.equal(offload.unpack(offload.pack(shared)), shared)
    assert torch.equal(offload.unpack(first), torch.ones(8))
    for value in range(50):  # memory that is given up is soon another tensor's
        assert offload.unpack(offload.pack(torch.full((8,), float(value))))[0] == value
    assert list(offload.copies) == [shared.untyped_storage()]


def test_nothing_but_the_input_of_one_block_is_on_the_device():
    """By the estimate's bytes, where the CPU's memory is another device."""
    peaks = {}
    for count in (8, 32):
        with tensors_without_content(), LiveBytes() as live:
            network = Blocks(count).requires_grad_(False)
            offload_activations(network, torch.device("meta"))
            x = torch.empty(1 << 14, 64, requires_grad=True)
            before = live.now
            network(x, torch.empty(1 << 14, 64)).sum().backward()
            peaks[count] = live.peak - before
    assert peaks[32] == peaks[8]


def test_what_blocks_share_comes_back_once_and_for_one_pass_at_a_time(monkeypatch):
    """Two passes, as of the two branches of guidance, need the memory of one."""
    peaks, copied = {}, []
    copy = offloading.copy_pieces
    monkeypatch.setattr(offloading, "copy_pieces", lambda *args: copied.append(copy(*args)))
    for passes in (1, 2):
        copied.clear()
        with tensors_without_content(), LiveBytes() as live:
            network = Blocks(8)
            offload_activations(network, torch.device("meta"))
            x = torch.empty(1 << 14, 64)
            sum(network(x, torch.empty_like(x)).sum() for _ in range(passes)).backward()
            peaks[passes] = live.peak
        assert len(copied) == passes * (8 + 1)  # each block's own input, and what they share
    assert peaks[2] - peaks[1] < x.nbytes


class Projected(nn.Module):
    """A frozen layer outside what is checkpointed, where autograd saves its weight, and a product."""

    def __init__(self):
        super().__init__()
        self.proj_out = nn.Linear(64, 64).requires_grad_(False)

    def forward(self, x, scale):
        return self.proj_out(x) * scale


def test_weights_stay_and_no_copy_outlives_the_backward_pass(small, monkeypatch):
    """Not even of a tensor that does."""
    copies, make = weakref.WeakSet(), OffloadedTensor.__init__

    def made(self, tensor, *args):
        make(self, tensor, *args)
        copies.add(self)
        shapes.append(tensor.shape)

    monkeypatch.setattr(OffloadedTensor, "__init__", made)
    network, scale = Projected(), torch.randn(8, 64)
    offload_activations(network, torch.device("cpu"))
    for _ in range(2):
        shapes = []
        network(torch.randn(8, 64, requires_grad=True), scale).sum().backward()
        assert shapes == [scale.shape] and not copies


def test_a_large_tensor_is_copied_in_pieces(monkeypatch):
    """None is rounded up to a power of two; where there is a GPU they are pinned."""
    monkeypatch.setattr(host_copy, "PIECE", 48)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.randn(5, 7, dtype=torch.bfloat16, device=device).t()
    offloaded = OffloadedTensor(tensor, torch.device("cpu"))
    assert [piece.nbytes for piece in offloaded.pieces] == [48, 22]
    assert all(piece.is_pinned() == tensor.is_cuda for piece in offloaded.pieces)
    assert torch.equal(offloaded.load(), tensor)


def test_small_tensors_and_passes_without_a_gradient_stay(monkeypatch):
    """A pass without a gradient sets no hooks at all."""
    offload = Offload(torch.device("cpu"))
    small = torch.ones(4)
    assert offload.pack(small) is small and offload.unpack(small) is small
    network = Blocks(1)
    offload_activations(network, torch.device("cpu"))
    monkeypatch.setattr(offloading, "saved_tensors_hooks", None)
    with torch.no_grad():
        network(torch.ones(2, 64), torch.ones(2, 64))
