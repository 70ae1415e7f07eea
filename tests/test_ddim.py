"""The DDIM process against the schedulers of diffusers, and against its own definition."""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler

from Core.sampling.ddim import DDIM
from Core.sampling.euler import DenoisingStep, run_steps

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COGVIDEOX = {
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
}
SCHEDULERS = {
    "cogvideox": lambda: CogVideoXDDIMScheduler(**BETAS, **COGVIDEOX, snr_shift_scale=3.0),
    "modelscope": lambda: DDIMScheduler(**BETAS, set_alpha_to_one=False, steps_offset=1, clip_sample=False),
    "v": lambda: DDIMScheduler(**BETAS, **COGVIDEOX, clip_sample=False),
}
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def latents(*seeds, dtype=torch.float32):
    return [
        torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(s), dtype=dtype) for s in seeds
    ]


def process_of(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(5)
    return DDIM.from_scheduler(scheduler)


def timesteps(*values):
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("count", [5, 7, 30])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@every_scheduler
def test_the_loop_equals_the_scheduler(name, spacing, count):
    """Its steps end beside the next timestep where the levels do not divide by their count, or are spaced otherwise."""
    scheduler = type(SCHEDULERS[name]()).from_config(SCHEDULERS[name]().config, timestep_spacing=spacing)
    scheduler.set_timesteps(count)
    process = DDIM.from_scheduler(scheduler)
    z, direction = latents(0, 1)

    def model(z, t, generated=None):
        return 0.5 * torch.tanh(z) + direction * (t / 1000)[:, None, None, None, None]

    step = DenoisingStep(model, process, scheduler.timesteps[:, None].repeat(1, 2) + 1)
    ours = run_steps(step, z, 0, count)
    for t in scheduler.timesteps:
        z = scheduler.step(model(z, t.repeat(2) + 1), int(t), z, return_dict=False)[0]
    torch.testing.assert_close(ours, z, rtol=1e-5, atol=1e-5)


@every_scheduler
def test_noise_levels_equal_the_scheduler(name):
    scheduler, (x0, noise) = SCHEDULERS[name](), latents(0, 1)
    process, t = process_of(name), torch.tensor([999, 250])
    expected = scheduler.add_noise(x0, noise, t)
    torch.testing.assert_close(process.add_noise(x0, noise, t + 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("name", ["modelscope", "v"])
def test_the_stochastic_step_equals_the_scheduler(name, eta):
    scheduler, (z, prediction, noise) = SCHEDULERS[name](), latents(0, 1, 2)
    scheduler.set_timesteps(5)
    t, t_next = scheduler.timesteps[1:3]
    expected = scheduler.step(prediction, int(t), z, eta=eta, variance_noise=noise, return_dict=False)[0]
    mean, std = DDIM.from_scheduler(scheduler).stochastic_step(
        z, prediction, t.repeat(2) + 1, t_next.repeat(2) + 1, eta
    )
    torch.testing.assert_close(mean + std[:, None, None, None, None] * noise, expected, rtol=1e-5, atol=1e-5)


@every_scheduler
def test_the_true_prediction_leads_back_to_data_and_to_every_level(name):
    process = process_of(name)
    x0, noise = latents(0, 1, dtype=torch.float64)
    t, t_next = timesteps(900, 40), timesteps(300, 7)
    z, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    torch.testing.assert_close(process.remove_noise(z, noise, t), x0)
    torch.testing.assert_close(process.step(z, target, t, t_next), process.add_noise(x0, noise, t_next))


def test_the_last_step_ends_in_data():
    process = process_of("cogvideox")
    z, prediction = latents(0, 1)
    t = timesteps(200, 1)
    ended = process.step(z, prediction, t, torch.zeros_like(t))
    signal, spread = (scale.view(-1, 1, 1, 1, 1).float() for scale in process._scales(t))
    torch.testing.assert_close(ended, signal * z - spread * prediction)  # CogVideoX predicts v


def test_the_last_stochastic_step_has_probabilities():
    process = process_of("cogvideox")
    z, prediction = latents(0, 1)
    t = timesteps(200, 20)
    mean, std = process.stochastic_step(z, prediction, t, torch.zeros_like(t), 0.7)
    torch.testing.assert_close(mean, process.step(z, prediction, t, torch.zeros_like(t)))
    assert (std > 0).all() and (std < 0.1).all()


def test_a_step_from_the_lowest_level_draws_nothing():
    process = process_of("v")
    std = process.step_std(timesteps(1000, 2, 1), timesteps(800, 0, 0), 1.0)
    assert (std > 0).tolist() == [True, True, False]


def test_the_timesteps_of_fractions_are_whole_and_span_the_axis():
    process = process_of("v")
    assert process.timesteps_at(torch.tensor([0, 0.1234, 1])).tolist() == [0, 124, 1000]


def test_what_has_no_x0_is_refused():
    with pytest.raises(ValueError, match="prediction_type must be epsilon or v_prediction, got 'sample'"):
        DDIM.from_scheduler(DDIMScheduler(prediction_type="sample"))
    with pytest.raises(ValueError, match="'epsilon' cannot start from pure noise"):
        DDIM.from_scheduler(CogVideoXDDIMScheduler(rescale_betas_zero_snr=True))
    process = process_of("v")
    z, prediction = latents(0, 1)
    with pytest.raises(ValueError, match="noise_level must be at most 1, got 1.5"):
        process.stochastic_step(z, prediction, timesteps(9, 9), timesteps(3, 3), 1.5)
