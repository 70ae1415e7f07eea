"""Each objective's gradient against its formula, written out again in float64 and in the papers' own notation.

There x_t = (1 − t) x0 + t ε and the velocity is v = ε − x0, with t from 1 (noise) to 0 (data).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import twin_runs
from test_gradients import PeakOfSavedTensors
from torch import Tensor
from twins import PROMPTS

from Core.data.video import read_video, save_video
from Core.modules import lora
from Core.training.objectives import leap
from Core.training.objectives.dpo_pairs import DPOPairs, DPOPairsSettings
from Core.training.trainer import Trainer
from Core.utils.timing import Stopwatch

SAMPLES = (0, 1)
KEYS = dict(num_frames=1, decode_frame=0)
TIMER = Stopwatch(torch.device("cpu"))


def gradient(trainer: Trainer, loss: Tensor) -> Tensor:
    grads = torch.autograd.grad(loss, trainer.parameters)
    return torch.cat([grad.flatten() for grad in grads])


def own_gradient(trainer: Trainer) -> Tensor:
    """Of the objective's terms, one backward pass each, as the trainer takes them."""
    terms = trainer.objective.losses(trainer.prompts_of(SAMPLES), SAMPLES, TIMER)
    return sum(gradient(trainer, term.loss.mean()) for term in terms)


def collect(trainer: Trainer) -> None:
    objective = trainer.objective
    objective.begin_step(0)
    objective.collect([(trainer.prompts_of(SAMPLES), SAMPLES)], trainer.distributed.gather, TIMER)
    objective.begin_update(0)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert wanted.norm() > 0
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def velocity(trainer: Trainer, guided: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    """v(x, t) with t [B] in [0, 1]."""
    features = [prompt.features_of() for prompt in trainer.prompts_of(SAMPLES)]
    return lambda x, t: -trainer.backbone.predictor(features, guided=guided)(x, 1000 * t)


def schedule(trainer: Trainer) -> Tensor:
    """[N + 1]: times from 1 to 0."""
    return torch.cat([trainer.backbone.timesteps(1)[:, 0] / 1000, torch.zeros(1)])


def trajectory(trainer: Trainer) -> list[Tensor]:
    """The N + 1 latents of the ODE's Euler steps, without a graph."""
    v, times, x = velocity(trainer), schedule(trainer), trainer.objective.rollout.noise(SAMPLES)
    latents = [x]
    with torch.no_grad():
        for t, after in zip(times, times[1:], strict=False):
            x = x + v(x, t.expand(2)) * (after - t)
            latents.append(x)
    return latents


def loss_of(trainer: Trainer, x0: Tensor) -> Tensor:
    """[2]: the reward's loss of clean latents."""
    frames = trainer.backbone.decode_frames(x0, torch.zeros(2, 1, dtype=torch.long))
    return trainer.reward_of(frames)


@pytest.fixture
def build(double_trainer) -> Callable[..., Trainer]:
    """Trainers of an objective on two images in float64."""

    def made(objective: str, **keys) -> Trainer:
        trainer = double_trainer(objective=objective, **KEYS | keys)
        texts = [encoded.prompt.reward_text for encoded in trainer.prompts_of(SAMPLES)]
        trainer.reward_of = lambda frames: trainer.objective.reward(frames, texts).loss
        return trainer

    return made


def each(t: Tensor) -> Tensor:
    return t[:, None, None, None, None]


def mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


@pytest.mark.parametrize(("share", "error_weight"), [(1.0, 0.0), (0.3, 2.0)])
def test_leap_follows_its_formula(build, share, error_weight):
    trainer = build("leap", nested_grad=share, leap_error_weight=error_weight)
    steps, times, latents = trainer.objective.leap_steps(SAMPLES, 4), schedule(trainer), trajectory(trainer)
    assert (steps[0] < steps[1]).all()
    k, j = times[steps]
    x_k, x_j = (torch.stack([latents[i][b] for b, i in enumerate(row)]) for row in steps.tolist())
    v = velocity(trainer)
    leap_1 = x_k - each(k - j) * v(x_k, k)
    x_j_reached = x_j + leap_1 - leap_1.detach()
    leap_2 = x_j_reached - each(j) * v(share * x_j_reached + (1 - share) * x_j_reached.detach(), j)
    x_0 = latents[-1] + leap_2 - leap_2.detach()
    errors = [mean_square(a.detach() - b) / mean_square(b) for a, b in ((leap_1, x_j), (leap_2, latents[-1]))]
    weight = torch.exp(-error_weight * sum(errors) / 2)
    assert_same(own_gradient(trainer), gradient(trainer, (weight * loss_of(trainer, x_0)).mean()))


def test_the_reward_of_leap_is_that_of_the_real_video(build):
    trainer = build("leap")
    term = trainer.objective.loss(trainer.prompts_of(SAMPLES), SAMPLES, TIMER)
    frames = trainer.backbone.decode_frames(trajectory(trainer)[-1], torch.zeros(2, 1, dtype=torch.long))
    texts = [encoded.prompt.reward_text for encoded in trainer.prompts_of(SAMPLES)]
    torch.testing.assert_close(term.score, trainer.objective.reward(frames, texts).score)


@pytest.mark.parametrize(("count", "early"), [(2, 0), (1, 2), (3, 1)])
def test_drtune_follows_its_formula(build, count, early):
    trainer = build("drtune", grad_steps=count, early_stop_steps=early)
    for number in range(6):
        trainer.objective.begin_step(number)
        chosen, taken = trainer.objective.grad_steps, trainer.objective.steps_taken
        assert len(chosen) == count and max(chosen) < taken and 4 - early <= taken <= 4
    times, v, x = schedule(trainer), velocity(trainer), trainer.objective.rollout.noise(SAMPLES)
    times = torch.cat([times[:taken], torch.zeros(1)])
    for i, (t, after) in enumerate(zip(times, times[1:], strict=False)):
        with torch.set_grad_enabled(i in chosen):
            step = v(x.detach(), t.expand(2)) * (after - t)
        x = x + step
    assert_same(own_gradient(trainer), gradient(trainer, loss_of(trainer, x).mean()))


def test_drtune_spreads_its_steps_over_the_whole_trajectory(build):
    objective = build("drtune", grad_steps=2).objective
    drawn = set()
    for number in range(30):
        objective.begin_step(number)
        drawn.add(tuple(sorted(objective.grad_steps)))
    assert drawn == {(0, 2), (1, 3)}


def aligned_loss(trainer: Trainer, x0: Tensor, decay: float) -> Tensor:
    """Direct-Align's loss of videos, written out."""
    width, v, total = trainer.objective.settings.align_width, velocity(trainer), 0.0
    for number in range(2):
        t = trainer.objective.levels(SAMPLES, number)
        noise = trainer.objective.rollout.normal("align", SAMPLES, number)
        x_t = each(1 - t) * x0 + each(t) * noise
        x_next = x_t - width * v(x_t, t)
        recovered = (x_next - each(t - width) * noise) / (1 - each(t - width))
        total = total + (torch.exp(-decay * t) * loss_of(trainer, recovered)).mean() / 2
    return total


def test_direct_align_follows_its_formula(build):
    trainer = build("direct_align", level_decay=2.0, align_width=0.2)
    wanted = gradient(trainer, aligned_loss(trainer, trajectory(trainer)[-1], 2.0))
    assert_same(own_gradient(trainer), wanted)


def test_direct_align_recovers_the_video_from_a_perfect_prediction(build):
    objective = build("direct_align").objective
    x0, noise = objective.rollout.noise(SAMPLES), objective.rollout.normal("align", SAMPLES)
    level = objective.levels(SAMPLES, 0)
    found = objective.denoised(lambda z, t: x0 - noise, x0, noise, level)
    torch.testing.assert_close(found, x0, rtol=1e-6, atol=1e-6)


class Shifted:
    """Predictions whose adapter is shifted along a direction where a graph is kept, and only there."""

    def __init__(self, trainer: Trainer, direction: Tensor):
        self.trainer, self.size, self.make = trainer, 0.0, trainer.backbone.predictor
        self.start = [p.detach().clone() for p in trainer.parameters]
        self.direction = direction.split([p.numel() for p in self.start])

    def __call__(self, *args, **kwargs):
        inner = self.make(*args, **kwargs)

        def predict(*inputs):
            self.move(self.size if torch.is_grad_enabled() else 0.0)
            try:
                return inner(*inputs)
            finally:
                self.move(0.0)

        return predict

    def move(self, size: float) -> None:
        for p, start, towards in zip(self.trainer.parameters, self.start, self.direction, strict=True):
            p.data = start + size * towards.view_as(start)


@pytest.mark.parametrize(("objective", "keys"), [("leap", dict(leap_error_weight=0.0)), ("direct_align", {})])
def test_gradients_with_a_graph_match_central_differences(build, objective, keys, monkeypatch):
    """What is sampled without a graph stays; a leap's end is shifted from where the unshifted leap landed."""
    trainer, landed = build(objective, **keys), []
    monkeypatch.setattr(
        leap, "connect", lambda real, end: landed.append(end.detach()) or real + end - landed[-1]
    )
    found = own_gradient(trainer)
    shifted = Shifted(trainer, found / found.norm())
    monkeypatch.setattr(trainer.backbone, "predictor", shifted)
    sides = []
    for shifted.size in (1e-5, -1e-5):
        ends = iter(landed)
        monkeypatch.setattr(leap, "connect", lambda real, end, ends=ends: real + end - next(ends))
        terms = trainer.objective.losses(trainer.prompts_of(SAMPLES), SAMPLES, TIMER)
        sides.append(sum(float(term.loss.detach().mean()) for term in terms))
    measured = (sides[0] - sides[1]) / 2e-5
    assert abs(float(found.norm()) - measured) <= 1e-4 * abs(measured)


def test_memory_of_leap_does_not_depend_on_the_steps_drawn(twin, tmp_path):
    keys = dict(objective="leap", image_size=twin_runs.SIZE, grad_checkpoint=False, **KEYS)
    keys["scheduler"] = dict(type="rflow", num_sampling_steps=6, cfg_scale=3.0)
    trainer = twin_runs.built_trainer(twin, tmp_path / "run", **keys)
    peaks = []
    for steps in ((0, 1), (0, 5), (4, 5)):
        drawn = torch.tensor(steps)[:, None].expand(2, 2)
        trainer.objective.leap_steps = lambda samples, count, drawn=drawn: drawn
        trainer.optimizer.zero_grad()
        peaks.append(PeakOfSavedTensors().during(trainer.train_step))
    assert len(set(peaks)) == 1


def stochastic_terms(trainer: Trainer, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of Flow-GRPO's step ``i`` from x, with the adapter as it is."""
    times, a = schedule(trainer).double(), 0.7
    t, delta, v = times[i], times[i + 1] - times[i], velocity(trainer)(x, schedule(trainer)[i].expand(2))
    clamped = t if t < 1 else times[i + 1]
    sigma = a * (clamped / (1 - clamped)).sqrt()
    mean = x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * delta
    return mean, sigma * (-delta).sqrt()


def perturb(trainer: Trainer) -> None:
    for number, parameter in enumerate(trainer.parameters):
        generator = torch.Generator().manual_seed(number)
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def advantages(trainer: Trainer) -> Tensor:
    rewards = trainer.objective.comparison.rewards
    assert rewards.std() > 0
    return ((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)).clamp(-5, 5)


@pytest.mark.parametrize("clip", [0.5, 1e-6])
def test_grpo_follows_its_formula(build, clip):
    """At its second update, where ratios differ from 1; at its first they are 1."""
    trainer = build("grpo", decode_frame=0, group_size=2, clip_range=clip, kl_weight=0.3, grad_steps=3)
    collect(trainer)
    objective, old = trainer.objective, {}
    for i in objective.grad_steps:
        before, after = objective.transitions[0, i]
        mean, std = stochastic_terms(trainer, i, before)
        noise = objective.rollout.normal("sde", SAMPLES, i)
        torch.testing.assert_close(after, mean + std * noise, rtol=1e-6, atol=1e-6)
        old[i] = mean.detach()
    first = list(objective.losses(trainer.prompts_of(SAMPLES), SAMPLES, TIMER))
    assert all((term.parts["ratio"] == 1).all() for term in first)
    perturb(trainer)
    total, ratios = 0.0, []
    for i in objective.grad_steps:
        before, after = objective.transitions[0, i]
        mean, std = stochastic_terms(trainer, i, before)
        with torch.no_grad(), lora.base_only(trainer.backbone.denoiser):
            base, _ = stochastic_terms(trainer, i, before)
        normal = torch.distributions.Normal
        log_ratio = normal(mean, std).log_prob(after) - normal(old[i], std).log_prob(after)
        ratio = log_ratio.flatten(1).mean(1).exp()
        a = advantages(trainer)
        kl = torch.distributions.kl_divergence(normal(mean, std), normal(base, std)).flatten(1).mean(1)
        total = total - torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a).mean() + 0.3 * kl.mean()
        ratios.append(ratio.detach())
    assert (torch.cat(ratios) != 1).all()
    assert_same(own_gradient(trainer), gradient(trainer, total))


def noised(trainer: Trainer, name: str, x0: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and the velocity to be predicted."""
    noise, t = trainer.objective.rollout.noising(name, SAMPLES, number)
    t = t / 1000
    return each(1 - t) * x0 + each(t) * noise, t, noise - x0


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_nft_follows_its_formula(build, beta):
    trainer = build("nft", decode_frame=0, group_size=2, nft_beta=beta, kl_weight=0.5)
    objective, v = trainer.objective, velocity(trainer, guided=False)
    collect(trainer)
    (x0,) = objective.videos.values()
    x_t, t, target = noised(trainer, "nft", x0, 0)
    with torch.no_grad(), objective.policy.applied():
        v_old = v(x_t, t)
    with torch.no_grad(), lora.base_only(trainer.backbone.denoiser):
        v_base = v(x_t, t)
    r = (advantages(trainer) / 5 / 2 + 0.5).clamp(0, 1)
    v_new = v(x_t, t)
    plus, minus = (1 - beta) * v_old + beta * v_new, (1 + beta) * v_old - beta * v_new
    loss = r * mean_square(plus - target) + (1 - r) * mean_square(minus - target)
    loss = loss + 0.5 * mean_square(v_new - v_base)
    wanted = gradient(trainer, loss.mean())
    assert (v_new - v_old).norm() > 0
    assert_same(own_gradient(trainer), wanted)


def test_nft_samples_with_a_slow_copy_of_the_adapter(build):
    trainer = build("nft", decode_frame=0, group_size=2, policy_decay=0.05)
    collect(trainer)
    before = [value.clone() for value in trainer.objective.tensors()]
    (first,) = trainer.objective.videos.values()
    perturb(trainer)
    collect(trainer)
    (second,) = trainer.objective.videos.values()
    assert torch.equal(first, second)
    trainer.objective.end_step()
    for old, value, new in zip(before, trainer.objective.tensors(), trainer.parameters, strict=True):
        torch.testing.assert_close(value, 0.05 * old + 0.95 * new.detach())


def preference(trainer: Trainer, better: Tensor, worse: Tensor, beta: float) -> Tensor:
    v, gained = velocity(trainer, guided=False), []
    for x0 in (better, worse):
        x_t, t, target = noised(trainer, "dpo", x0, 0)
        with torch.no_grad(), lora.base_only(trainer.backbone.denoiser):
            reference = mean_square(target - v(x_t, t))
        gained.append(mean_square(target - v(x_t, t)) - reference)
    return -F.logsigmoid(-beta / 2 * (gained[0] - gained[1]))


def test_dpo_follows_its_formula(build):
    trainer = build("dpo", decode_frame=0, group_size=2, dpo_beta=3.0)
    latents = trajectory(trainer)[-1]
    collect(trainer)
    order = trainer.objective.comparison.rewards.argsort(descending=True)
    better, worse = (latents[i].expand_as(latents) for i in order)
    assert_same(own_gradient(trainer), gradient(trainer, preference(trainer, better, worse, 3.0).mean()))


def write_pairs(folder, prompts: Sequence[str], size: tuple[int, int] = twin_runs.SIZE) -> str:
    """A file with one pair of pictures for each prompt."""
    entries = []
    for number, prompt in enumerate(prompts):
        pixels = torch.rand(2, 3, 1, *size, generator=torch.Generator().manual_seed(number)) * 2 - 1
        files = [save_video(p, folder / f"{number}_{side}", 8).name for side, p in enumerate(pixels)]
        entries.append(dict(prompt=prompt, better=files[0], worse=files[1]))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(folder / "pairs.jsonl")


def test_dpo_learns_from_a_file_of_pairs(double_trainer, tmp_path):
    keys = dict(objective="dpo_pairs", pairs=write_pairs(tmp_path, PROMPTS), dpo_beta=3.0, num_frames=1)
    trainer = double_trainer(**keys)
    names = [encoded.prompt.text for encoded in trainer.prompts_of(SAMPLES)]
    pictures = [
        [read_video(tmp_path / f"{PROMPTS.index(name)}_{side}.png") for name in names] for side in (0, 1)
    ]
    better, worse = (trainer.backbone.vae.encode(torch.stack(side).double()) for side in pictures)
    assert_same(own_gradient(trainer), gradient(trainer, preference(trainer, better, worse, 3.0).mean()))


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (None, "cannot be read: [Errno 2] No such file"),
        ("", "is empty; give one pair per line"),
        ('{"prompt": "a"}', "must be a JSON object with the keys prompt, better, worse"),
        ('{"prompt": "a", "better": "x.mp4", "worse": "y.mp4"}', "line 1 of"),
        ("missing prompts", "has no pair for 3 of the 4 training prompts, such as"),
        ("another size", "_0.png' has 1 frame of 32×32, but the run's videos have 1 frame of 32×16"),
    ],
)
def test_pairs_that_cannot_be_used_are_refused_with_a_sentence(twin, tmp_path, capsys, lines, sentence):
    path = tmp_path / "pairs.jsonl"
    if lines == "missing prompts":
        write_pairs(tmp_path, PROMPTS[:1])
    elif lines == "another size":
        write_pairs(tmp_path, PROMPTS, (32, 32))
    elif lines is not None:
        path.write_text(lines)
    keys = dict(
        objective="dpo_pairs", pairs=str(path), num_frames=1, image_size=twin_runs.SIZE, train_batch_size=4
    )
    keys |= dict(val_batch_size=1, scheduler=dict(type="rflow", num_sampling_steps=1, cfg_scale=1.0))
    assert twin_runs.start(twin, tmp_path / "run", **keys) == 2
    assert sentence in capsys.readouterr().err


def test_other_pairs_are_another_run(tmp_path):
    settings = DPOPairsSettings(pairs=write_pairs(tmp_path, PROMPTS[:2]))
    before = DPOPairs.contents(settings)
    moved = DPOPairsSettings(pairs=str(Path(settings.pairs).rename(tmp_path / "renamed.jsonl")))
    assert DPOPairs.contents(moved) == before
    lines = Path(moved.pairs).read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text(lines[0])
    assert DPOPairs.contents(DPOPairsSettings(pairs=str(tmp_path / "fewer.jsonl"))) != before
