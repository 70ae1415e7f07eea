"""The sampler: numbers of the public release, which steps keep a graph, and what that graph costs.

Axes: B batch, C channels, T latent frames, H rows, W columns, N sampling steps.
"""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import golden_data
import pytest
import torch
from golden_data import relative_error
from torch import Tensor, nn

from Core.backbones.opensora_sampling import guided_velocity
from Core.sampling.euler import DenoisingStep, RectifiedFlow, run_steps
from Core.sampling.gradient_window import first_gradient_step, thin_no_grad_steps
from Core.schedulers.rf import RFLOW
from Core.training.objectives.reward_gradient import RewardGradientSettings, WindowRollout
from Core.utils.timing import Stopwatch
from opensora.registry import SCHEDULERS, build_module
from opensora.schedulers.rf.rectified_flow import RFlowScheduler, timestep_transform
from opensora.utils.inference_utils import prepare_multi_resolution_info

GOLDEN, METADATA = golden_data.tensors("rflow_tiny")
CASES = json.loads(METADATA["cases"])
GRADIENTS = [(name, steps) for name, case in CASES.items() for steps in case.get("K", [])]
WATCHED = "temporal_blocks.0.cross_attn.q_linear.weight"


class Text:
    """The captions of a golden case, as a text encoder would give them."""

    def __init__(self, name: str, model: nn.Module):
        self.case, self.model = golden_data.case(GOLDEN, name), model

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"y": self.case["y"].clone(), "mask": self.case["text_mask"].clone()}

    def null(self, count: int) -> Tensor:
        return self.model.y_embedder.y_embedding[None, None].expand(count, 1, -1, -1)


@pytest.fixture
def model():
    return golden_data.golden_stdit(GOLDEN, METADATA)


def sampler(name: str) -> RFLOW:
    case = CASES[name]
    return RFLOW(
        num_sampling_steps=case["steps"],
        cfg_scale=case["cfg"],
        use_timestep_transform=case.get("tt", True),
        use_discrete_timesteps=case.get("disc", False),
    )


def size_info(name: str) -> dict[str, Tensor]:
    case = CASES[name]
    return prepare_multi_resolution_info(
        "STDiT2", case["shape"][0], case["image_size"], case["num_frames"], 24, "cpu", torch.float32
    )


def sample(name: str, model: nn.Module, **kwargs) -> Tensor:
    """`RFLOW.sample` on the inputs of a golden case."""
    z = GOLDEN[f"{name}.z"].clone()
    arguments = dict(
        z=z, prompts=["p"] * len(z), device="cpu", additional_args=size_info(name), progress=False
    )
    return sampler(name).sample(model, Text(name, model), **{**arguments, **kwargs})


def velocity(name: str, model: nn.Module, **kwargs):
    """The guided velocity that `RFLOW.sample` integrates in a golden case."""
    text = Text(name, model)
    y = text.encode([])["y"]
    options = dict(guidance_scale=CASES[name]["cfg"], **kwargs)
    return guided_velocity(model, y, text.null(len(y)), text.case["text_mask"], size_info(name), **options)


@pytest.mark.parametrize("name", CASES)
def test_timesteps_and_samples_are_those_of_the_release(name, model):
    timesteps = sampler(name).timesteps(CASES[name]["shape"][0], size_info(name))
    assert relative_error(timesteps, GOLDEN[f"{name}.timesteps"]) <= 1e-5
    torch.manual_seed(0)
    z = sample(name, model, mask=GOLDEN.get(f"{name}.mask"))
    assert relative_error(z, GOLDEN[f"{name}.sample"]) <= 1e-5
    assert not z.requires_grad


@pytest.mark.parametrize(("name", "window"), GRADIENTS)
def test_gradient_through_the_last_steps_is_that_of_the_release(name, window, model):
    steps = CASES[name]["steps"]
    timesteps = sampler(name).timesteps(CASES[name]["shape"][0], size_info(name))
    step = DenoisingStep(velocity(name, model), RectifiedFlow(), timesteps)
    with torch.no_grad():
        z = run_steps(step, GOLDEN[f"{name}.z"].clone(), 0, steps - window)
    z = run_steps(step, z, steps - window, steps)
    assert relative_error(z, GOLDEN[f"{name}.sample"]) <= 1e-5
    (gradient,) = torch.autograd.grad(z.square().mean(), model.get_parameter(WATCHED))
    assert relative_error(gradient, GOLDEN[f"{name}.grad_last{window}"]) <= 1e-4


@pytest.mark.parametrize("recompute", [False, True])
def test_the_sampler_keeps_the_gradient_of_its_last_step(recompute, model):
    z = sample("image", model, backprop_mode="last", use_grad_checkpoint=recompute)
    (gradient,) = torch.autograd.grad(z.square().mean(), model.get_parameter(WATCHED))
    assert relative_error(gradient, GOLDEN["image.grad_last1"]) <= 1e-4


def test_a_mask_of_all_frames_costs_nothing_and_changes_nothing(model):
    calls = []
    model.register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
    shape = CASES["transform"]["shape"]
    masked = sample("transform", model, mask=torch.ones(shape[0], shape[1]))
    assert len(calls) == CASES["transform"]["steps"]
    assert not any("x_mask" in kwargs for kwargs in calls)
    assert torch.equal(masked, sample("transform", model))


def test_a_kept_frame_comes_out_as_it_went_in(model):
    z = GOLDEN["transform.z"]
    mask = torch.ones(z.shape[0], z.shape[2])
    mask[:, 0] = 0
    out = sample("transform", model, mask=mask)
    assert torch.equal(out[:, :, 0], z[:, :, 0])
    assert (out[:, :, 1:] != z[:, :, 1:]).all()


def test_text_is_encoded_once_per_sample_and_once_for_its_gradient(model, monkeypatch):
    encoded = []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda **kwargs: encoded.append(1) or encode(**kwargs))
    sample("transform", model)
    assert len(encoded) == 1
    sample("transform", model, backprop_mode="last")
    assert len(encoded) == 3


def test_a_model_without_encode_text_gives_the_same(model):
    """Upstream's own STDiT3 has no such method."""

    class Upstream(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.y_embedder = model, model.y_embedder

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    assert relative_error(sample("transform", Upstream()), GOLDEN["transform.sample"]) <= 1e-5


def test_guidance_of_one_runs_the_caption_alone(model):
    batches = []
    model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    sample("transform", model, guidance_scale=1.0)
    assert set(batches) == {CASES["transform"]["shape"][0]}


class Steps(nn.Module):
    """A velocity with one weight that notes, step by step, how it was called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.seen: list[dict] = []

    def forward(self, z: Tensor, t: Tensor, generated: Tensor | None = None) -> Tensor:
        self.seen.append(
            {
                "graph": z.grad_fn is not None,
                "recording": torch.is_grad_enabled(),
                "trainable": self.weight.requires_grad,
            }
        )
        return self.weight * z


def integrate(steps: int, first: int, **settings) -> tuple[Tensor, Steps]:
    """The training rollout of a family whose prediction is ``Steps``, from a latent of ones."""
    moves, timer = Steps(), Stopwatch(torch.device("cpu"))
    backbone = SimpleNamespace(
        process=RectifiedFlow(),
        predictor=lambda features, **_: moves,
        features=lambda encoded: {},
        timesteps=lambda batch: torch.linspace(1000, 1000 / steps, steps)[:, None].expand(steps, batch),
        no_grad_steps=nullcontext,
    )
    rollout = WindowRollout(RewardGradientSettings(**settings), backbone, seed=0)
    rollout.noise = lambda samples: torch.ones(len(samples), 1, 1, 1, 1)
    z, kl = rollout.sample([SimpleNamespace()], [0], first, timer)
    assert kl is None
    return z, moves


@pytest.mark.parametrize(("steps", "first"), [(6, 5), (6, 3), (6, 0), (1, 0)])
def test_only_the_window_keeps_a_graph(steps, first):
    z, moves = integrate(steps, first)
    assert [seen["recording"] for seen in moves.seen] == [i >= first for i in range(steps)]
    # The latent that enters the window's first step has no history either.
    assert [seen["graph"] for seen in moves.seen] == [i > first for i in range(steps)]
    # z = (1 + w/N)^N, of which the window's factors alone depend on w.
    (gradient,) = torch.autograd.grad(z.sum(), moves.weight)
    expected = (steps - first) / steps * (1 + 0.5 / steps) ** (steps - 1)
    assert gradient.item() == pytest.approx(expected, rel=1e-5)


def test_sampling_alone_keeps_no_graph_and_restores_the_mode():
    z, moves = integrate(4, 4)
    assert not z.requires_grad and not any(seen["recording"] for seen in moves.seen)
    assert torch.is_grad_enabled()


def test_requires_grad_is_never_touched_while_sampling(model, monkeypatch):
    frozen = [name for name, _ in model.named_parameters() if "spatial" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    during = []
    model.register_forward_pre_hook(
        lambda *_: during.append({name: p.requires_grad for name, p in model.named_parameters()})
    )

    def refuse(*_):
        raise AssertionError("requires_grad_ was called")

    monkeypatch.setattr(nn.Module, "requires_grad_", refuse)
    sample("transform", model, backprop_mode="last")
    assert len(during) == CASES["transform"]["steps"] and all(state == before for state in during)


def test_a_detached_input_leaves_the_sum_as_the_only_path_back():
    steps = 4
    z, moves = integrate(steps, 1, detach_input=True)
    (gradient,) = torch.autograd.grad(z.sum(), moves.weight)
    inputs = [(1 + 0.5 / steps) ** i for i in range(steps)]
    assert gradient.item() == pytest.approx(sum(inputs[1:]) / steps, rel=1e-5)


def refuse_draw(n: int) -> int:
    raise AssertionError("nothing is drawn here")


@pytest.mark.parametrize(
    ("mode", "steps", "window", "first"),
    [
        ("last", 30, 1, 29),
        ("last", 30, 30, 0),
        ("specific", 30, 1, 15),
        ("specific", 16, 1, 15),
        (None, 9, 1, 9),
    ],
)
def test_where_the_window_begins(mode, steps, window, first):
    assert first_gradient_step(mode, steps, refuse_draw, window) == first


def test_a_random_window_begins_anywhere():
    assert [first_gradient_step("rand", 5, lambda n, i=i: i % n) for i in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("mode", "steps", "window", "message"),
    [
        ("first", 30, 1, "backprop_mode must be one of last, rand, specific, got 'first'"),
        ("last", 4, 5, r"backprop_steps must be between 1 and num_sampling_steps \(4\), got 5"),
        ("last", 4, 0, "backprop_steps must be between 1"),
        ("specific", 15, 1, "keeps gradients from step 15, but num_sampling_steps is 15; take more than 15"),
    ],
)
def test_impossible_windows_are_refused(mode, steps, window, message):
    with pytest.raises(ValueError, match=message):
        first_gradient_step(mode, steps, refuse_draw, window)


def test_the_registry_builds_the_sampler_and_refuses_unknown_keys():
    built = build_module(dict(type="rflow", num_sampling_steps=30, cfg_scale=7.0), SCHEDULERS)
    assert isinstance(built, RFLOW) and (built.num_sampling_steps, built.cfg_scale) == (30, 7.0)
    with pytest.raises(ValueError, match="unknown keys in `scheduler`: cfg"):
        RFLOW(cfg=7.0)


def flow_batch() -> tuple[Tensor, Tensor, Tensor]:
    """(x_0, noise, t) of four latents."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 4, 2, 3, 2, 2, generator=generator)
    return x, noise, torch.tensor([0.0, 250.0, 500.0, 1000.0])


def test_noising_mixes_data_and_noise():
    x, noise, t = flow_batch()
    mixed = RFlowScheduler().add_noise(x, noise, t)
    assert torch.equal(mixed[0], x[0]) and torch.equal(mixed[3], noise[3])
    torch.testing.assert_close(mixed[1], 0.75 * x[1] + 0.25 * noise[1])


def test_the_loss_is_zero_for_the_true_velocity_and_counts_each_sample_apart():
    x, noise, t = flow_batch()
    truth = x - noise
    scheduler = RFlowScheduler()
    exact = scheduler.training_losses(lambda *_, **__: truth, x, noise=noise, t=t)
    assert torch.equal(exact["loss"], torch.zeros(4))
    off = torch.tensor([0.0, 1.0, 2.0, 3.0])
    wrong = scheduler.training_losses(
        lambda *_, **__: truth + off[:, None, None, None, None], x, noise=noise, t=t
    )
    torch.testing.assert_close(wrong["loss"], off.square())
    weighted = scheduler.training_losses(
        lambda *_, **__: truth + 1, x, noise=noise, t=t, weights=torch.tensor([1.0, 0.0, 2.0, 3.0])
    )
    torch.testing.assert_close(weighted["loss"], torch.tensor([1.0, 0.0, 2.0, 3.0]))


def test_masked_frames_are_given_clean_and_do_not_count():
    x, noise, t = flow_batch()
    mask = torch.tensor([[False, True, True]]).expand(4, 3)

    def model(x_t: Tensor, t: Tensor, x_mask: Tensor) -> Tensor:
        assert torch.equal(x_t[:, :, 0], x[:, :, 0]) and torch.equal(x_mask, mask)
        velocity = x - noise
        velocity[:, :, 0] += 100
        return velocity

    assert torch.equal(
        RFlowScheduler().training_losses(model, x, noise=noise, t=t, mask=mask)["loss"], torch.zeros(4)
    )


@pytest.mark.parametrize(
    "options", [{}, {"sample_method": "logit-normal"}, {"use_discrete_timesteps": True}], ids=str
)
def test_training_timesteps_fill_their_range(options):
    torch.manual_seed(0)
    t = RFlowScheduler(**options).sample_timesteps(2000, torch.device("cpu"))
    assert 0 <= t.min() < 50 and 950 < t.max() <= 1000
    assert abs(t.mean() - 500) < 25
    assert options.get("use_discrete_timesteps", False) == bool((t == t.round()).all())


def test_larger_videos_are_trained_under_more_noise():
    info = {"height": torch.tensor([256.0, 1024.0]), "width": torch.tensor([256.0, 1024.0])}
    info["num_frames"] = torch.tensor([1, 51])
    t = timestep_transform(torch.tensor([500.0, 500.0]), info, num_timesteps=1000)
    # r·u / (1 + (r − 1)·u) at u = 1/2: r = 1/2 for the small image, r = 2·sqrt(15) for the large video.
    ratio = 2 * 15**0.5
    torch.testing.assert_close(t, torch.tensor([1000 / 3, 1000 * ratio / (1 + ratio)]))


def test_impossible_timestep_draws_are_refused():
    with pytest.raises(ValueError, match="sample_method must be 'uniform' or 'logit-normal', got 'cosine'"):
        RFlowScheduler(sample_method="cosine")
    with pytest.raises(ValueError, match="use_discrete_timesteps needs sample_method='uniform'"):
        RFlowScheduler(sample_method="logit-normal", use_discrete_timesteps=True)


def test_a_thinned_prefix_spans_what_it_stands_for():
    times = torch.arange(12, 0, -1)[:, None]
    for steps in (None, 9, 20):
        kept, first = thin_no_grad_steps(times, 9, steps)
        assert kept is times and first == 9
    kept, first = thin_no_grad_steps(times, 9, 3)
    assert (kept[:, 0].tolist(), first) == ([12, 9, 6, 3, 2, 1], 3)
    kept, first = thin_no_grad_steps(times, 9, 4)
    assert (kept[:, 0].tolist(), first) == ([12, 10, 8, 6, 3, 2, 1], 4)
