"""Activations that wait in the CPU's memory: the same gradient, and nothing kept on the device."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from Core.estimate.live_bytes import LiveBytes
from Core.estimate.values import tensors_without_content
from Core.modules import offloading
from Core.modules.offloading import Offload, offload_activations


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
    assert first[0] is second[0]
    shared += 1
    assert torch.equal(offload.unpack(offload.pack(shared)), shared)
    assert torch.equal(offload.unpack(first), torch.ones(8))
    for value in range(50):  # memory that is given up is soon another tensor's
        assert offload.unpack(offload.pack(torch.full((8,), float(value))))[0] == value
    assert not offload.copies.keys() - {id(shared.untyped_storage())}


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
