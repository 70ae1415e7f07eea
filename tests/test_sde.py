"""The process that objectives ask, and the stochastic sampler: against closed forms of a Gaussian target."""

import pytest
import torch
from torch import Tensor

from Core.sampling.euler import RectifiedFlow, per_video
from Core.sampling.sde import Gaussian, StochasticStep

MEAN, STD = 0.7, 0.4  # of the data, in every element
SHAPE = (1, 1, 1, 100, 200)
STEPS = 400


def marginal(t: float) -> tuple[float, float]:
    """Mean and variance of x_t = (1 − t) x_0 + t ε."""
    return (1 - t) * MEAN, ((1 - t) * STD) ** 2 + t**2


def predict(z: Tensor, t: Tensor, generated=None) -> Tensor:
    """The exact prediction E[x_0 − ε | x_t]."""
    level = float(t[0]) / 1000
    mean, variance = marginal(level)
    return MEAN + ((1 - level) * STD**2 - level) / variance * (z - mean)


def normals(number: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


@pytest.mark.parametrize(("noise_level", "until"), [(0.3, 1.0), (0.7, 0.8)])
def test_the_stochastic_sampler_has_the_odes_marginals(noise_level, until):
    """Within 4 standard errors at every step. With much noise the first steps' Euler error is larger, and decays."""
    timesteps = torch.linspace(1000, 1000 / STEPS, STEPS, dtype=torch.float64)[:, None]
    step = StochasticStep(predict, RectifiedFlow(), timesteps, noise_level, normals)
    z, checked = normals(STEPS), 0
    for i in range(STEPS):
        z, t = step(z, i), float(step.next_timesteps[i]) / 1000
        mean, variance = marginal(t)
        if t < until:
            checked += 1
            assert abs(z.mean() - mean) <= 4 * (variance / z.numel()) ** 0.5
            assert abs(z.var() - variance) <= 4 * variance * (2 / z.numel()) ** 0.5
    assert checked >= until * STEPS - 1


def test_a_start_just_below_pure_noise_draws_what_pure_noise_does():
    """Schedules begin at 1 up to a rounding error, where the noise of the formula has a pole."""
    starts, ends = torch.tensor([1000, 999.999, 999.99994]), torch.full((3,), 990.0)
    std = RectifiedFlow().step_std(starts, ends, 0.7)
    torch.testing.assert_close(std, std[:1].expand(3), rtol=1e-3, atol=0)


def test_log_probabilities_and_divergences_are_torchs_own_per_element():
    mean, std, z = torch.randn(2, 3, 1, 4, 4), torch.tensor([0.3, 2.0]), torch.randn(2, 3, 1, 4, 4)
    own, other = Gaussian(mean, std), Gaussian(mean + 0.1, std)
    normal, shifted = (torch.distributions.Normal(g.mean, per_video(std)) for g in (own, other))
    torch.testing.assert_close(own.log_prob(z), normal.log_prob(z).flatten(1).mean(1))
    kl = torch.distributions.kl_divergence(normal, shifted).flatten(1).mean(1)
    torch.testing.assert_close(own.kl(other), kl)
    torch.testing.assert_close(
        own.log_prob(own.at(torch.zeros_like(mean))), normal.log_prob(mean).flatten(1).mean(1)
    )


def test_the_process_turns_noise_and_predictions_into_each_other():
    process = RectifiedFlow()
    x0, noise = torch.randn(2, 3, 1, 4, 4), torch.randn(2, 3, 1, 4, 4)
    t = process.timesteps_at(torch.tensor([0.25, 0.9]))
    z, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    assert t.tolist() == [250, 900]
    torch.testing.assert_close(process.step(z, target, t, torch.zeros_like(t)), x0)
    torch.testing.assert_close(process.remove_noise(z, noise, t), x0, rtol=1e-4, atol=1e-5)
    later = process.timesteps_at(torch.tensor([0.1, 0.5]))
    torch.testing.assert_close(process.step(z, target, t, later), process.add_noise(x0, noise, later))
