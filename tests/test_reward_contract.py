"""What every scorer promises, whatever it scores: see the docstring of `Core.rewards.base.Reward`.

Axes: B videos, F frames, 3 channels, H rows, W columns.
"""

from __future__ import annotations

import pytest
import torch
from reward_twins import twin_arguments
from torch import Tensor, nn

from Core.rewards import REGISTRY, ImageReward, Reward, build_reward

PROMPTS = ["a man riding a bike", "playing guitar"]
SCORERS = sorted(REGISTRY)
NAMES = [*SCORERS, "mixture"]
FRAMES = 4


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


@pytest.mark.parametrize("name", NAMES)
def test_gradient_matches_central_differences_and_reaches_every_frame(name, arguments):
    reward = build(name, arguments, dtype=torch.float64)
    frames = random_frames(dtype=torch.float64).requires_grad_()
    gradient = torch.autograd.grad(reward(frames, PROMPTS).loss.sum(), frames)[0]
    assert (gradient.abs().amax(dim=(2, 3, 4)) > 0).all()

    generator = torch.Generator().manual_seed(1)
    # Along the gradient itself nothing cancels; a random direction sees every pixel.
    for direction in (gradient, torch.randn(frames.shape, generator=generator, dtype=torch.float64)):
        step = 1e-6 * direction / direction.abs().max()
        with torch.no_grad():
            ahead, behind = (reward(frames + sign * step, PROMPTS).loss.sum() for sign in (1, -1))
        expected, measured = (gradient * step).sum(), (ahead - behind) / 2
        assert abs(expected - measured) <= 1e-4 * max(abs(measured), gradient.norm() * step.norm() * 1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_batch_scores_equal_single_scores(name, arguments):
    reward = build(name, arguments)
    frames = random_frames()
    together = reward(frames, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = reward(frames[i : i + 1], [prompt])
        torch.testing.assert_close(alone.score, together.score[i : i + 1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone.loss, together.loss[i : i + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCORERS)
def test_slices_change_neither_score_nor_gradient(name, arguments):
    results = []
    for size in (1, 64):
        reward = build(name, arguments)
        for module in reward.modules():
            if isinstance(module, Reward):
                module.slice_size = size
        frames = random_frames().requires_grad_()
        output = reward(frames, PROMPTS)
        results.append((output.score.detach(), torch.autograd.grad(output.loss.sum(), frames)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("name", [name for name in SCORERS if name not in ("aesthetic_hps",)])
def test_all_frames_cost_one_forward(name, arguments):
    reward = build(name, arguments)
    method = "score_images" if isinstance(reward, ImageReward) else "score_clips"
    original, calls = getattr(reward, method), []

    def counted(*args):
        calls.append(len(args[0]))
        return original(*args)

    object.__setattr__(reward, method, counted)
    reward(random_frames(), PROMPTS)
    assert calls == [2 * FRAMES if isinstance(reward, ImageReward) else 2]


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
