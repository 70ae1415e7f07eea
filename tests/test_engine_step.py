"""The pieces of a training step and of its guards, one by one."""

import dataclasses
import os
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import twin_runs
from torch import nn
from twins import config_file, settings

from Core.build import build_backbone
from Core.config import ConfigError, build_config, load_config
from Core.config.schema import OptimizerSettings
from Core.modules import lora
from Core.modules.ema import Ema
from Core.modules.lora import StepDropout
from Core.rewards import RewardOutput
from Core.training.early_stopping import ValidationHistory
from Core.training.nan_check import find_fault
from Core.training.objectives.reward_gradient import WindowRollout
from Core.training.optimizer import lr_factor
from Core.training.setup import adapt_for_training
from Core.training.signals import StopRequest
from Core.training.trainer import Trainer
from Core.utils import rng
from Core.utils.distributed import Distributed
from Core.utils.timing import Stopwatch

SCORED = RewardOutput(torch.zeros(1), torch.zeros(1), {})
ROOTED = """
from Core.rewards import ImageReward, RewardInfo


class Rooted(ImageReward):
    info = RewardInfo(name="rooted", summary="a root whose gradient is infinite at its zero", range="0")

    def score_images(self, images, prompts):
        mean = images.mean(dim=(1, 2, 3))
        return (mean - mean.detach()).sqrt() * 0
"""


@pytest.fixture(scope="module")
def loaded(twin, tmp_path_factory):
    """Config, adapted backbone and encoded prompts of a two-step twin; the adapter is not zero."""
    folder = tmp_path_factory.mktemp("step")
    values = settings(twin, folder / "run", num_frames=1, decode_frame=0, grad_checkpoint=False)
    values["scheduler"] = values["scheduler"] | {"num_sampling_steps": 2}
    config = load_config([str(config_file(folder / "config.py", values))])
    backbone, prompts = build_backbone(config, Distributed(), config.prompt_list)
    adapt_for_training(config, backbone)
    with torch.no_grad():
        for name, parameter in lora.parameters(backbone.denoiser).items():
            parameter.normal_(generator=rng.generator(0, name)).mul_(0.2)
    return config, backbone, prompts


def sampled(loaded, samples: list[int], first: int | None = None, **keys):
    """Latents and KL of the first prompts' rollout, from the gradient window's own first step by default."""
    config, backbone, prompts = loaded
    rollout = WindowRollout(dataclasses.replace(config.objective, **keys), backbone, config.run.seed)
    first = rollout.first_grad_step(0) if first is None else first
    return rollout.sample(prompts[: len(samples)], samples, first, Stopwatch(torch.device("cpu")))


def gradients(loaded, **keys) -> torch.Tensor:
    """Gradient of Σ z² over two samples, flattened."""
    z, _ = sampled(loaded, [4, 5], **keys)
    parameters = list(lora.parameters(loaded[1].denoiser).values())
    grads = torch.autograd.grad(z.square().sum(), parameters)
    return torch.cat([grad.flatten() for grad in grads])


def test_cond_keeps_the_value_and_leaves_out_the_null_branch(loaded):
    config, backbone, prompts = loaded
    captions = [prompt.features_of() for prompt in prompts[:2]]
    parameters = list(lora.parameters(backbone.denoiser).values())
    z = rng.noise([rng.generator(0, "z", n) for n in range(2)], backbone.latent_shape())
    t = torch.full((2,), 300.0)
    v = {grad: backbone.predictor(captions, null_grad=grad)(z, t) for grad in (True, False)}
    torch.testing.assert_close(v[True], v[False], rtol=1e-5, atol=1e-5)
    text_only = config.family.scheduler["cfg_scale"] * backbone.predictor(captions, guided=False)(z, t)
    wanted = torch.autograd.grad(
        text_only.square().sum() * 0 + (text_only * v[False].detach()).sum(), parameters
    )
    got = torch.autograd.grad((v[False] * v[False].detach()).sum(), parameters)
    for first, second in zip(wanted, got, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_debug_names_the_operation_behind_a_nan(twin, tmp_path):
    file = tmp_path / "rooted.py"
    file.write_text(ROOTED)
    keys = dict(reward_fn=f"{file}:Rooted", reward_args={}, num_frames=1, decode_frame=0)
    assert twin_runs.built_trainer(twin, tmp_path / "plain", **keys).train_step().skipped
    named = pytest.warns(UserWarning, match="rooted.py")
    with named, pytest.raises(RuntimeError, match="SqrtBackward0.*nan"):
        twin_runs.built_trainer(twin, tmp_path / "debugged", debug=True, **keys).train_step()


def test_the_distance_to_the_base_model_is_its_own_velocity_difference(loaded):
    config, backbone, prompts = loaded
    kl = sampled(loaded, [4, 5], first=1, kl_weight=1.0)[1].per_sample()
    captions = [prompt.features_of() for prompt in prompts[:2]]
    timesteps = backbone.timesteps(2)
    with torch.no_grad():
        z = WindowRollout(config.objective, backbone, config.run.seed).noise([4, 5])
        z = z + backbone.predictor(captions)(z, timesteps[0]) * (timesteps[0] - timesteps[1])[0] / 1000
        adapted = backbone.predictor(captions, guided=False)(z, timesteps[1])
        lora.set_scale(backbone.denoiser, 0)
        base = backbone.predictor(captions, guided=False)(z, timesteps[1])
        lora.set_scale(backbone.denoiser, 1)
    torch.testing.assert_close(
        kl.detach(), (adapted - base).square().flatten(1).mean(1), rtol=1e-4, atol=1e-6
    )
    assert kl.min() > 1e-4
    assert kl.requires_grad
    assert sampled(loaded, [4, 5])[1] is None


def test_detached_inputs_change_the_gradient_and_not_the_video(loaded):
    plain, detached = (gradients(loaded, backprop_steps=2, detach_input=flag) for flag in (False, True))
    assert not torch.allclose(plain, detached)
    one = [gradients(loaded, backprop_steps=1, detach_input=flag) for flag in (False, True)]
    torch.testing.assert_close(*one)


def test_dropout_masks_follow_from_seed_step_and_layer(loaded):
    dropout = StepDropout(0.5, 400)
    x = torch.ones(3, 5, 400)

    def masked(*index):
        dropout.draw(rng.generator(0, "dropout", *index))
        return dropout(x)

    first = masked("layer", 1)
    assert torch.equal(first, masked("layer", 1)) and torch.equal(first, dropout(x))
    assert not torch.equal(first, masked("layer", 2)) and not torch.equal(first, masked("other", 1))
    assert torch.equal(first, first[:1, :1].expand_as(first)) and first.unique().tolist() == [0.0, 2.0]
    assert 0.8 < float(first.mean()) < 1.2
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_masks_lie_where_their_layer_does():
    with torch.device("meta"):
        model = lora.attach(nn.Sequential(nn.Linear(4, 4)), ["0"], rank=2, alpha=2, dropout=0.5)
    assert {module.mask.device.type for module in model.modules() if isinstance(module, StepDropout)} == {
        "meta"
    }


def test_the_moving_average_is_applied_and_taken_back():
    parameter = nn.Parameter(torch.zeros(2))
    ema = Ema({"w": parameter}, decay=0.5)
    for _ in range(3):
        parameter.data += 1
        ema.update()
    # Decays 0.1, 2/11, 0.25 while it warms up.
    wanted = 0.9 * 1
    wanted = wanted * 2 / 11 + 2 * 9 / 11
    wanted = wanted * 0.25 + 3 * 0.75
    with ema.applied():
        torch.testing.assert_close(parameter.data, torch.full((2,), wanted))
    assert parameter.tolist() == [3, 3]
    other = Ema({"w": nn.Parameter(torch.zeros(2))}, decay=0.5)
    other.load(ema.state())
    assert torch.equal(other.average["w"], ema.average["w"]) and other.updates == 3


def test_a_fault_names_samples_and_parameters():
    parameters = {name: nn.Parameter(torch.zeros(2)) for name in "abcde"}
    for parameter in parameters.values():
        parameter.grad = torch.ones(2)
    values = torch.ones(3, 2)
    samples = [(10, "a fox"), (11, "a dog"), (12, "a bird")]
    assert find_fault(samples, values, parameters) is None
    values[1, 0] = torch.nan
    parameters["c"].grad[1] = torch.inf
    fault = find_fault(samples, values, parameters)
    assert str(fault) == "reward or loss of 'a dog' (sample 11); gradient of c, …"


def history(early_stop=None, **values) -> ValidationHistory:
    made = ValidationHistory(early_stop, lower_is_better=["compression"])
    for step, row in enumerate(zip(*values.values(), strict=True)):
        made.add({"step": 10 * step, **dict(zip(values, row, strict=True))})
    return made


def test_a_monitor_that_falls_while_the_reward_rises_is_put_in_words():
    hacked = history(reward=[0.2, 0.3], motion=[0.05, 0.02], sharpness=[1.0, 0.99])
    (warning,) = hacked.warnings(["motion", "sharpness", "diversity"])
    assert "reward went from 0.2 to 0.3 since step 0 while motion went from 0.05 to 0.02" in warning
    assert not history(reward=[0.3, 0.2], motion=[0.05, 0.02]).warnings(["motion"])
    assert not history(reward=[0.2, 0.3], motion=[0.02, 0.05]).warnings(["motion"])
    assert history(reward=[0.2, 0.3], compression=[1.0, 2.0]).warnings(["compression"])


def test_early_stop_waits_for_its_patience():
    rule = dict(monitor="motion", fall=0.2, patience=2)
    assert not history(rule, motion=[1.0, 0.7]).stop_reason()
    assert not history(rule, motion=[1.0, 0.7, 0.85]).stop_reason()
    assert (
        "more than 20% below its best, 1, for 2 validations"
        in history(rule, motion=[1, 0.7, 0.7]).stop_reason()
    )
    plain = dict(monitor="reward", patience=2)
    assert not history(plain, reward=[1.0, 2.0, 3.0]).stop_reason()
    assert "no better than its best" in history(plain, reward=[1.0, 3.0, 3.0, 2.0]).stop_reason()
    nothing = history(plain, reward=[1.0, float("nan"), float("nan")])
    assert not nothing.stop_reason()


def test_early_stop_errors_say_what_is_allowed(twin, tmp_path):
    def errors(rule, monitors=()) -> list[str]:
        try:
            build_config(settings(twin, tmp_path / "run", early_stop=rule, monitors=list(monitors)))
        except ConfigError as error:
            return error.errors
        return []

    assert errors(None) == [] and errors({"monitor": "sharpness"}, ["sharpness"]) == []
    assert "must have the key monitor" in errors({"fall": 0.1})[0]
    found = errors({"monitor": "hps", "patience": 0, "fall": 2}, ["sharpness"])
    assert len(found) == 3 and any("reward, motion, diversity, sharpness" in error for error in found)
    assert "unknown key 'early_stop.patiense'" in errors({"monitor": "reward", "patiense": 3})[0]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_schedules(schedule):
    config = OptimizerSettings(lr_schedule=schedule, lr_warmup_steps=4)
    factors = [lr_factor(config, step, 14) for step in range(14)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    if schedule == "constant":
        assert set(factors[4:]) == {1.0}
    else:
        assert factors[4:] == sorted(factors[4:], reverse=True)
        assert factors[9] == pytest.approx(0.5) and 0 < factors[13] < 0.15


def test_a_stop_request_is_noted_once_and_handlers_are_put_back(capfd):
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal_name == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before
    assert "once more exits at once" in capfd.readouterr().err


def test_a_signal_that_the_launcher_passes_on_as_well_counts_once(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal_name == "SIGUSR1"


@pytest.fixture
def scaled():
    """Processes with fp16's gradient scaler, on the CPU, one parameter and its SGD."""
    distributed = Distributed()
    distributed.accelerator.state._mixed_precision, distributed.accelerator.native_amp = "fp16", True
    distributed.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    parameter = nn.Parameter(torch.tensor([1.0]))
    return distributed, parameter, distributed.prepare(torch.optim.SGD([parameter], lr=1.0))


def test_a_first_step_without_a_loss_is_no_fault_in_fp16(scaled):
    distributed, parameter, optimizer = scaled
    distributed.average_gradients([parameter], [False])
    assert distributed.clip([parameter], 1.0) == 0
    assert not distributed.optimizer_step(optimizer, 0.0, False)
    assert parameter.item() == 1


def test_fp16_gradients_are_unscaled_once(scaled):
    distributed, parameter, optimizer = scaled
    distributed.backward((0.5 * parameter).sum())
    norm = distributed.clip([parameter], 10.0)
    assert norm == pytest.approx(0.5)
    assert not distributed.optimizer_step(optimizer, norm, faulty=False)
    assert parameter.item() == pytest.approx(0.5)


def test_fp16_overflow_lowers_the_scale_and_another_fault_does_not(scaled):
    distributed, parameter, optimizer = scaled
    distributed.backward((parameter * torch.inf).sum())
    assert distributed.optimizer_step(optimizer, distributed.clip([parameter], 10.0), faulty=False)
    assert parameter.item() == 1.0 and distributed.scaler_state()["scale"] == 512.0
    for loss in (0.5 * parameter, parameter * torch.inf):
        distributed.backward(loss.sum())
        assert not distributed.optimizer_step(optimizer, distributed.clip([parameter], 10.0), faulty=True)
        assert parameter.item() == 1.0 and distributed.scaler_state()["scale"] == 512.0
    distributed.backward((0.5 * parameter).sum())
    distributed.optimizer_step(optimizer, distributed.clip([parameter], 10.0), faulty=False)
    assert parameter.item() == pytest.approx(0.5)


def test_fp16s_scale_stops_at_its_floor(scaled):
    """A gradient that overflows without any scaling is a fault; a scale of 0 would hide it for good."""
    distributed, parameter, optimizer = scaled
    calibrating = []
    for _ in range(12):
        distributed.backward((parameter * torch.inf).sum())
        calibrating.append(
            distributed.optimizer_step(optimizer, distributed.clip([parameter], 10.0), faulty=False)
        )
    assert calibrating == [True] * 10 + [False] * 2 and distributed.scaler_state()["scale"] == 1.0


def scaled_run(twin, folder, scale: float, overflows_above: float) -> Trainer:
    """A run of four steps under a gradient scaler, whose gradients overflow above a scale; one bad step stops it."""
    keys = dict(num_frames=1, decode_frame=0, max_train_steps=4, max_bad_steps=1, grad_checkpoint=False)
    trainer = twin_runs.built_trainer(twin, folder, **keys)
    distributed = trainer.distributed
    distributed.accelerator.state._mixed_precision, distributed.accelerator.native_amp = "fp16", True
    distributed.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    distributed.accelerator._optimizers.clear()
    distributed.autocast = nullcontext  # the arithmetic stays float32's
    trainer.optimizer = distributed.prepare(trainer.optimizer.optimizer)
    trainer.parameters[0].register_hook(
        lambda grad: grad + torch.inf if scaler.get_scale() > overflows_above else grad
    )
    trainer.validation_is_due = lambda: False
    return trainer


def test_the_scalers_search_is_no_bad_step(twin, tmp_path):
    trainer = scaled_run(twin, tmp_path / "run", scale=65536.0, overflows_above=16384.0)
    trainer.fit()
    assert (trainer.step, trainer.skipped_steps, trainer.bad_steps) == (4, 2, 0)
    assert trainer.distributed.scaler_state()["scale"] == 16384.0


def test_an_overflow_at_the_scalers_floor_is_one(twin, tmp_path):
    trainer = scaled_run(twin, tmp_path / "run", scale=2.0, overflows_above=0.0)
    with pytest.raises(ValueError, match="1 steps in a row had no finite reward and gradient"):
        trainer.fit()
    assert trainer.step == 2 and trainer.distributed.scaler_state()["scale"] == 1.0


def test_a_missing_process_is_an_error(monkeypatch):
    monkeypatch.setenv("VADER_NUM_PROCESSES", "4")
    with pytest.raises(ValueError, match="4 processes were asked for but 1 started"):
        Distributed()


def test_a_validation_cut_short_has_no_score_and_is_left_out_of_warnings():
    history = ValidationHistory(None, lower_is_better=["compression"])
    history.add({"step": 0, "reward": 1.0, "motion": 0.4})
    history.add({"step": 10, "reward": 5.0, "motion": 0.2, "diversity": 0.3})
    history.add({"step": 20, "reward": float("nan")})
    assert history.score_at(20) is None and history.score_at(10) == 5.0 and history.score_at(5) is None
    (warning,) = history.warnings(["motion", "diversity"])
    assert "from 1 to 5 since step 0 while motion went from 0.4 to 0.2" in warning


def test_validation_scores_at_the_frame_rate_of_training(twin, tmp_path, monkeypatch):
    """Whatever the files play at."""
    seen = []
    monkeypatch.setattr(
        "Core.training.validation.score_videos", lambda *given: seen.append(given[3]) or SCORED
    )
    trainer = twin_runs.built_trainer(
        twin, tmp_path / "run", fps=24, save_fps=8, num_frames=1, decode_frame=0
    )
    trainer.validation._score(
        SimpleNamespace(pixels=torch.zeros(3, 1, 16, 32), sample=SimpleNamespace(prompt=None))
    )
    assert seen == [24]
