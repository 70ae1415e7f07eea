"""Frozen layers in 8-bit float: what they compute, and what they keep for the backward pass."""

import torch
from torch import nn

from Core.quantize import Fp8Linear


def layer(dtype: torch.dtype = torch.float32) -> Fp8Linear:
    torch.manual_seed(0)
    return Fp8Linear.of(nn.Linear(48, 32).to(dtype).requires_grad_(False))


def test_values_and_gradients_are_those_of_the_widened_weight():
    stored = layer()
    wide = nn.Linear(48, 32)
    wide.load_state_dict({"weight": stored.weight.float() * stored.scale, "bias": stored.bias})
    x = torch.randn(2, 5, 48, requires_grad=True)
    y, wanted = stored(x), wide(x)
    assert torch.equal(y, wanted)
    (grad,), (wanted,) = (torch.autograd.grad(out.square().sum(), x) for out in (y, wanted))
    torch.testing.assert_close(grad, wanted)


def test_nothing_is_kept_for_the_backward_pass_but_what_is_stored_anyway():
    stored = layer(torch.bfloat16)
    own = {t.untyped_storage().data_ptr() for t in (*stored.parameters(), *stored.buffers())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = stored(torch.randn(4, 48, dtype=torch.bfloat16, requires_grad=True))
    assert kept and sum(t.nbytes for t in kept if t.untyped_storage().data_ptr() not in own) == 0
    y.sum().backward()


def test_gradients_pass_under_another_autocast():
    x = torch.randn(4, 48, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        y = layer(torch.bfloat16)(x)
    y.float().sum().backward()
    assert y.dtype == torch.float16 and x.grad.dtype == torch.float32 and bool(x.grad.isfinite().all())
