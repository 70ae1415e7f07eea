"""What every scorer promises, whatever it scores: see the docstring of `Core.rewards.base.Reward`.

Axes: B videos, F frames, 3 channels, H rows, W columns.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from reward_twins import twin_arguments
from torch import Tensor, nn

from Core.rewards import (
    REGISTRY,
    ImageReward,
    Reward,
    RewardInfo,
    VideoReward,
    base,
    build_reward,
    resolve_reward,
    vjepa,
)
from Core.rewards.mixture import Mixture
from Core.rewards.vbench import EveryFrame
from Core.training.setup import build_scorers

PROMPTS = ["a man riding a bike", "playing guitar"]
SCORERS = sorted(name for name in REGISTRY if resolve_reward(name).differentiable)
NAMES = [*SCORERS, "mixture"]
FRAMES = 4
WITHOUT_NETWORK = {
    *("motion", "sharpness", "saturation"),
    *("temporal_flickering", "motion_smoothness", "dynamic_degree"),
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> dict[str, dict]:
    return twin_arguments(tmp_path_factory.mktemp("twins"))


def build(name: str, arguments: dict[str, dict], **kwargs) -> Reward:
    if name == "mixture":
        parts = {"pick_score": 1.0, "compression": 0.1, "motion": 0.5}
        return build_reward(parts, {part: arguments[part] for part in parts}, **kwargs)
    return build_reward(name, arguments[name], **kwargs)


def random_frames(
    batch: int = 2, size: tuple[int, int] = (32, 32), dtype=torch.float32, seed: int = 0
) -> Tensor:
    """[B, F, 3, H, W] uniform in (-0.9, 0.9), away from the clamp."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, FRAMES, 3, *size, generator=generator, dtype=dtype) * 1.8 - 0.9


@pytest.mark.parametrize("name", NAMES)
def test_result_is_typed_per_sample_and_float32(name, arguments):
    reward = build(name, arguments, dtype=torch.bfloat16)
    frames = random_frames().to(torch.bfloat16).requires_grad_()
    output = reward(frames, PROMPTS)
    for values in (output.score, output.loss, *output.parts.values()):
        assert values.shape == (2,) and values.dtype == torch.float32 and values.isfinite().all()
    assert output.score.requires_grad and output.loss.requires_grad
    assert output.parts and not any(part.requires_grad for part in output.parts.values())


@pytest.mark.parametrize("name", NAMES)
def test_scorer_stays_frozen_whatever_its_owner_does(name, arguments):
    owner = nn.Module()
    owner.reward = build(name, arguments)
    owner.train()
    owner.requires_grad_(True)
    frames = random_frames().requires_grad_()
    owner.reward(frames, PROMPTS).loss.sum().backward()
    assert not any(module.training for module in owner.reward.modules())
    assert not list(owner.parameters())
    assert not any(buffer.requires_grad or buffer.grad is not None for buffer in owner.reward.buffers())
    assert frames.grad.isfinite().all()


class Bare(ImageReward):
    """A scorer as a user may write it, with a network and a weight of its own."""

    info = RewardInfo(name="bare", summary="test", range="any")

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.network = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Dropout(0.5))
        self.register_parameter("shift", nn.Parameter(torch.zeros(())))
        self.add_module("last", nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.5)))

    def score_images(self, images, prompts):
        return self.scale * self.last(self.network(images)).mean(dim=(1, 2, 3)) + self.shift


def test_no_way_of_adding_or_waking_a_network_leaves_it_trainable():
    reward = Bare()
    assert "scale" not in dict(reward.named_parameters())
    reward.register_module("later", nn.Dropout(0.5))
    reward.network.train()
    reward.network[0] = nn.Conv2d(3, 1, 1)
    frames = random_frames().requires_grad_()
    scores = [reward(frames, PROMPTS).score for _ in range(2)]
    torch.testing.assert_close(*scores, rtol=0, atol=0)  # no dropout
    scores[0].sum().backward()
    assert not list(reward.parameters()) and not any(module.training for module in reward.modules())
    assert not any(buffer.requires_grad or buffer.grad is not None for buffer in reward.buffers())
    assert set(reward.state_dict()) >= {"scale", "shift", "network.0.weight", "last.0.weight"}


@pytest.mark.parametrize(
    ("result", "given"),
    [
        (lambda images: images.mean(), r"\[\]"),
        (lambda images: images.mean(dim=(2, 3)), r"\[8, 3\]"),
        (lambda images: images.mean(dim=(1, 2, 3))[:, None], r"\[8, 1\]"),
        (lambda images: images.mean().item(), "float"),
    ],
)
def test_scores_of_a_wrong_shape_are_refused(result, given):
    class Shapeless(ImageReward):
        info = RewardInfo(name="shapeless", summary="test", range="any")

        def score_images(self, images, prompts):
            return result(images)

    with pytest.raises(ValueError, match=rf"reward 'shapeless' must give one score .* \[8\], got {given};"):
        Shapeless()(random_frames(), PROMPTS)


def test_scores_and_losses_are_widened_to_float32_and_losses_not_averaged():
    class Half(ImageReward):
        info = RewardInfo(name="half", summary="test", range="any")

        def score_images(self, images, prompts):
            return images.half().mean(dim=(1, 2, 3))

    output = Half()(random_frames(), PROMPTS)
    assert output.score.dtype == output.loss.dtype == torch.float32

    class Averaged(Half):
        def loss(self, raw):
            return raw.mean()

    with pytest.raises(ValueError, match=r"'half' must give one score and one loss .* \[8\], got \[\]"):
        Averaged()(random_frames(), PROMPTS)


@pytest.mark.parametrize(
    ("name", "head", "extra"),
    [
        ("actpred", "network.classifier.bias", {"action": "bike"}),
        ("object_detection", "network.class_labels_classifier.layers.2.bias", {}),
        ("object_detection", "network.class_labels_classifier.layers.2.bias", {"goal": "lower"}),
    ],
)
def test_a_saturated_class_keeps_its_gradient(name, head, extra, arguments):
    reward = build_reward(name, arguments[name] | extra)
    bias = reward.get_buffer(head)
    bias[:] = 0.0
    chosen = 2 if name == "actpred" else 1  # as the twins number "bike" and "dog"
    bias[chosen] = 300.0 if extra.get("goal") == "lower" else -300.0  # its probability rounds to 1 or 0
    frames = random_frames().requires_grad_()
    output = reward(frames, PROMPTS)
    assert (output.loss > 200).all() and output.loss.isfinite().all()
    assert (torch.autograd.grad(output.loss.sum(), frames)[0].abs().amax(dim=(2, 3, 4)) > 0).all()


def test_a_mixture_clamps_its_pixels_once(arguments, monkeypatch):
    calls = []
    clamp = base.to_unit_range
    monkeypatch.setattr(base, "to_unit_range", lambda frames: calls.append(1) or clamp(frames))
    build("mixture", arguments)(random_frames(), PROMPTS)
    assert len(calls) == 1


def test_a_mixture_lets_the_sum_of_its_parts_lead_a_pixel_back():
    """Each part's gradient alone would be judged alone: one that leads out must not be dropped from the sum."""

    def plain(sign: int) -> type[ImageReward]:
        class Plain(ImageReward):
            info = RewardInfo(name=f"plain{sign}", summary="test", range="any")

            def score_images(self, images, prompts):
                return sign * images.mean(dim=(1, 2, 3))

        return Plain

    mixture = Mixture({"up": plain(1)(), "down": plain(-1)()}, {"up": 2.0, "down": 1.0})
    frames = torch.full((1, 1, 3, 4, 4), 1.5, requires_grad=True)
    gradient = torch.autograd.grad(mixture(frames, ["a"]).loss.sum(), frames)[0]
    assert (gradient == 0).all()  # the sum asks for brighter still, though one part asks for darker


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_keeps_losses_float32_and_gradients_finite(name, dtype, arguments):
    reward = build(name, arguments, dtype=dtype)
    frames = random_frames().to(dtype).requires_grad_()
    loss = reward(frames, PROMPTS).loss
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), frames)[0].isfinite().all()


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("aesthetic", {"resize": "pad", "target": 7.0}),
        ("aesthetic_hps", {"hps": {"hps_resize": "squash"}}),
        ("clip_score", {"resize": "squash"}),
        ("pick_score", {"resize": "pad"}),
        ("compression", {"resize": "crop", "target": 2.0}),
        ("weather", {"kind": "snowy", "resize": "pad"}),
        ("snowy", {"target": 2.0, "resize": "crop"}),
        ("object_detection", {"goal": "lower", "slice_size": 3}),
        ("actpred", {"action": "swimming", "slice_size": 1}),
        ("motion", {"target": 0.2}),
        ("relative", {"reward": "clip_score", "positive": "", "reward_args": {"resize": "pad"}}),
    ],
)
def test_other_arguments_score_and_train(name, extra, arguments):
    given = dict(arguments[name])
    for key, value in extra.items():
        given[key] = given[key] | value if isinstance(value, dict) else value
    frames = random_frames(size=(24, 40)).requires_grad_()
    output = build_reward(name, given)(frames, PROMPTS)
    assert output.loss.isfinite().all()
    assert (torch.autograd.grad(output.loss.sum(), frames)[0].abs().amax(dim=(2, 3, 4)) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_matches_central_differences_and_reaches_every_frame(name, arguments):
    reward = build(name, arguments, dtype=torch.float64)
    # Of half the contrast: enlarging overshoots beside an edge, and a clamped pixel keeps a gradient on purpose.
    frames = (random_frames(dtype=torch.float64) / 2).requires_grad_()
    gradient = torch.autograd.grad(reward(frames, PROMPTS).loss.sum(), frames)[0]
    assert (gradient.abs().amax(dim=(2, 3, 4)) > 0).all()

    generator = torch.Generator().manual_seed(1)
    # Along the gradient itself nothing cancels; a random direction sees every pixel.
    for direction in (gradient, torch.randn(frames.shape, generator=generator, dtype=torch.float64)):
        step = 1e-6 * direction / direction.abs().max()
        with torch.no_grad():
            ahead, behind = (reward(frames + sign * step, PROMPTS).loss.sum() for sign in (1, -1))
        expected, measured = (gradient * step).sum(), (ahead - behind) / 2
        assert abs(expected - measured) <= 1e-5 * max(abs(measured), gradient.norm() * step.norm() * 1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_order_and_company_of_a_video_do_not_matter(name, arguments):
    """In float64, where only the order of additions differs."""
    reward = build(name, arguments, dtype=torch.float64)
    frames = random_frames(dtype=torch.float64)
    together, reversed_ = reward(frames, PROMPTS), reward(frames.flip(0), PROMPTS[::-1])
    alone = [reward(frames[i : i + 1], [prompt]) for i, prompt in enumerate(PROMPTS)]
    for part in ("score", "loss"):
        expected = getattr(together, part)
        torch.testing.assert_close(getattr(reversed_, part).flip(0), expected, rtol=1e-9, atol=1e-9)
        singles = torch.cat([getattr(output, part) for output in alone])
        torch.testing.assert_close(singles, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCORERS)
def test_slices_change_neither_score_nor_gradient(name, arguments):
    results = []
    for size in (1, 64):
        reward = build(name, arguments, dtype=torch.float64)
        for module in reward.modules():
            if isinstance(module, Reward):
                module.slice_size = size
        frames = random_frames(dtype=torch.float64).requires_grad_()
        output = reward(frames, PROMPTS)
        results.append((output.score.detach(), torch.autograd.grad(output.loss.sum(), frames)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_ascent_on_the_pixels_of_noise_improves_the_score(name, arguments):
    """20 steps against the sign of the loss's gradient, each 1/128 of the pixel range."""
    reward = build(name, arguments)
    frames = random_frames(seed=3)
    before = reward(frames, PROMPTS)
    for _ in range(20):
        frames.requires_grad_()
        gradient = torch.autograd.grad(reward(frames, PROMPTS).loss.sum(), frames)[0]
        frames = frames.detach() - gradient.sign() / 64
    after = reward(frames, PROMPTS)
    sign = 1 if reward.higher_is_better else -1
    assert (sign * (after.score - before.score) > 0).all()
    assert (after.loss < before.loss).all()


def pixel_networks(reward: Reward) -> list[nn.Module]:
    """The modules that a picture or a clip enters the networks of a scorer by."""
    entries = ("Conv2d", "Conv3d")
    return [module for module in reward.modules() if type(module).__name__ in entries]


@pytest.mark.parametrize("name", SCORERS)
def test_all_frames_cost_one_forward_of_each_network_and_a_slice_one_more(name, arguments):
    calls: list[nn.Module] = []
    for slice_size, forwards in ((64, 1), (1, 2 * FRAMES)):
        reward = build(name, arguments)
        single = [module for module in reward.modules() if isinstance(module, Reward)]
        for module in single:
            module.slice_size = slice_size
        clips = any(isinstance(m, VideoReward) and not isinstance(m, EveryFrame) for m in single)
        calls.clear()
        for network in pixel_networks(reward):
            network.register_forward_hook(lambda module, *_: calls.append(module))
        with torch.no_grad():
            reward(random_frames(), PROMPTS)
        expected = min(forwards, 2) if clips else forwards
        expected *= 2 if name == "relative" else 1
        assert all(calls.count(network) == expected for network in pixel_networks(reward)), name
        assert bool(calls) == (name not in WITHOUT_NETWORK)


def test_the_features_vjepa_is_measured_by_are_normalised_in_float32(arguments, monkeypatch):
    seen = []
    original = torch.nn.functional.layer_norm
    monkeypatch.setattr(vjepa.F, "layer_norm", lambda x, *args: seen.append(x.dtype) or original(x, *args))
    build("vjepa", arguments, dtype=torch.bfloat16)(random_frames(), PROMPTS)
    assert torch.float32 in seen


def test_layers_of_vjepa_are_recomputed_and_not_kept(arguments):
    reward = build("vjepa", arguments)
    calls = []
    reward.network.encoder.layer[0].register_forward_pre_hook(lambda *_: calls.append(1))
    frames = random_frames().requires_grad_()
    loss = reward(frames, PROMPTS).loss.sum()
    before = len(calls)
    loss.backward()
    assert before == 3 and len(calls) == 2 * before  # everything, and the context of each of two tasks


def test_score_of_a_video_is_the_mean_over_its_frames(arguments):
    reward = build("pick_score", arguments)
    frames = random_frames()
    single = [reward(frames[:, i : i + 1], PROMPTS) for i in range(FRAMES)]
    output = reward(frames, PROMPTS)
    torch.testing.assert_close(output.score, torch.stack([out.score for out in single]).mean(0))
    torch.testing.assert_close(output.loss, torch.stack([out.loss for out in single]).mean(0))


def test_saturated_pixels_keep_the_gradient_that_leads_back(arguments):
    reward = build("saturation", arguments)
    frames = random_frames()
    frames[0, 0, :, 0, 0] = torch.tensor([1.5, 0.0, -1.5])  # more saturation asks for exactly this
    frames[0, 0, :, 0, 1] = torch.tensor([0.2, 0.0, 1.5])
    frames.requires_grad_()
    less = reward(frames, PROMPTS).score.sum()
    gradient = torch.autograd.grad(less, frames)[0][0, 0]
    assert gradient[2, 0, 1] > 0  # descending the saturation lowers the over-bright channel
    more = -reward(frames, PROMPTS).score.sum()
    gradient = torch.autograd.grad(more, frames)[0][0, 0]
    assert gradient[0, 0, 0] == 0 and gradient[2, 0, 0] == 0  # nothing pushes them further out


def test_half_precision_leaves_the_heads_in_float32(arguments):
    exact, half = (build("aesthetic", arguments, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.bfloat16
    for name, buffer in half.head.named_buffers():
        torch.testing.assert_close(buffer, exact.head.get_buffer(name), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("base", "mixed_precision", "expected"),
    [
        (torch.float16, "bf16", torch.bfloat16),
        (torch.float16, "fp16", torch.float32),
        (torch.float16, "no", torch.float32),
        (torch.bfloat16, "bf16", torch.bfloat16),
        (torch.float32, "bf16", torch.float32),
    ],
)
def test_training_never_runs_a_scorer_in_float16(base, mixed_precision, expected, arguments):
    config = SimpleNamespace(
        reward=SimpleNamespace(reward_fn="pick_score", arguments=arguments["pick_score"]),
        validation=SimpleNamespace(monitors=["aesthetic"], monitor_args=arguments),
        optimizer=SimpleNamespace(mixed_precision=mixed_precision),
    )
    distributed = SimpleNamespace(device=torch.device("cpu"))
    reward, monitors = build_scorers(config, distributed, SimpleNamespace(dtype=base, mesh=None))
    assert reward.dtype == monitors["aesthetic"].dtype == expected


def test_text_is_encoded_once_per_prompt(arguments, monkeypatch):
    reward = build("pick_score", arguments)
    encoded = []
    original = type(reward.text).encode
    monkeypatch.setattr(
        type(reward.text), "encode", lambda self, texts: encoded.extend(texts) or original(self, texts)
    )
    for _ in range(2):
        reward(random_frames(), PROMPTS)
    reward(random_frames(), [PROMPTS[0]] * 2)
    assert encoded == PROMPTS
    reward.to(torch.float64)
    reward(random_frames(dtype=torch.float64), PROMPTS)
    assert encoded == PROMPTS * 2  # cached features of another precision are not reused


@pytest.mark.parametrize(
    ("frames", "prompts", "message"),
    [
        (
            torch.zeros(2, 3, 8, 8),
            ["a", "b"],
            r"floating-point \[B, F, 3, H, W\], got torch.float32 \[2, 3, 8, 8\]",
        ),
        (torch.zeros(2, 1, 3, 8, 8, dtype=torch.uint8), ["a", "b"], "got torch.uint8"),
        (torch.zeros(2, 1, 3, 8, 8), ["a"], "2 videos, prompts: 1"),
        (torch.zeros(2, 1, 3, 8, 8), "ab", "2 videos, prompts: one string"),
        (torch.zeros(2, 1, 3, 8, 8), ["a", "b"], "needs at least 2 frames, got 1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(frames, prompts, message):
    with pytest.raises(ValueError, match=message):
        build_reward("motion")(frames, prompts)
