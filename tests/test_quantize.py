"""Frozen layers in 8-bit float and 4 bits: what they compute, and what they keep for the backward pass."""

import pytest
import torch
import twin_runs
import twins
from torch import nn

from Core.modules.quantization import Fp8Linear, Nf4Linear, store_linears_in_fp8, store_linears_in_nf4


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


def test_four_bits_are_an_eighth_of_float32_and_kept_nowhere_else():
    torch.manual_seed(0)
    linear = nn.Linear(64, 128).requires_grad_(False)
    stored = Nf4Linear.of(linear)
    own = {t.untyped_storage().data_ptr() for t in (*stored.parameters(), *stored.buffers())}
    x = torch.randn(3, 5, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = stored(x)
    assert stored.weight.nbytes * 8 == linear.weight.nbytes
    assert all(t.untyped_storage().data_ptr() in own for t in kept)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (exact,) = torch.autograd.grad(linear(x).sum(), x)
    assert (y - linear(x)).norm() < 0.15 * linear(x).norm() and (grad - exact).norm() < 0.15 * exact.norm()


@pytest.mark.parametrize(("store", "bound"), [(store_linears_in_fp8, 0.05), (store_linears_in_nf4, 0.2)])
def test_the_velocity_is_about_the_exact_one(store, bound):
    model = twins.stdit().requires_grad_(False)
    z, t = torch.randn(1, 4, 5, 4, 4), torch.tensor([500.0])
    sizes = dict(fps=torch.tensor([24.0]), height=torch.tensor([32.0]), width=torch.tensor([32.0]))
    y = torch.randn(1, 1, 6, twins.TEXT_WIDTH)
    exact = model(z, t, y, **sizes)[:, :4]
    store([*model.spatial_blocks, *model.temporal_blocks])
    error = ((model(z, t, y, **sizes)[:, :4] - exact).norm() / exact.norm()).item()
    assert 0 < error < bound


def test_a_step_on_four_bits_trains_the_adapter(twin, tmp_path):
    trainer = twin_runs.built_trainer(twin, tmp_path / "run", base_quant="nf4")
    before = [p.detach().clone() for p in trainer.parameters]
    result = trainer.train_step()
    assert result.grad_norm > 0 and not result.skipped
    assert any(bool((p != start).any()) for p, start in zip(trainer.parameters, before, strict=True))


def test_two_ways_to_store_a_weight_are_refused(twin, tmp_path, capfd):
    assert twin_runs.start(twin, tmp_path / "run", base_quant="nf4", dtype="fp8") == 2
    assert "base_quant='nf4' and dtype='fp8' both say how weights are stored" in capfd.readouterr().err
