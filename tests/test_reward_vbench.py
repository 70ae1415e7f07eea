"""What a video does over time, against closed-form cases and VBench's own steps written out with other tools."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from reward_twins import clip_folder, dino_folder, smooth_images
from torch import Tensor
from transformers import CLIPModel, ViTModel

from Core.rewards import build_reward
from Core.rewards.flow import between, optical_flow
from Core.rewards.vbench import is_dynamic

NETWORKS = {"subject_consistency": dino_folder, "background_consistency": clip_folder}
OTHERS = ["temporal_flickering", "motion_smoothness", "dynamic_degree"]


def texture(shift: tuple[float, float], size: tuple[int, int] = (64, 96), seed: int = 0) -> Tensor:
    """A cloudy picture [1, 3, H, W] moved by so many pixels to the right and down, exactly: by its spectrum."""
    height, width = size
    noise = torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))
    down, right = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)
    frequency = (down**2 + right**2).sqrt()
    frequency[0, 0] = math.inf
    spectrum = torch.fft.fft2(noise) / frequency
    still = torch.fft.ifft2(spectrum).real
    moved = torch.fft.ifft2(spectrum * torch.exp(-2j * math.pi * (right * shift[0] + down * shift[1]))).real
    return (moved / still.std() / 6 + 0.5).clamp(0, 1)[None]


def moving(speed: float, frames: int = 5, size: tuple[int, int] = (64, 96)) -> Tensor:
    """A clip [1, F, 3, H, W] in [-1, 1] of that texture at a constant speed to the right."""
    return torch.stack([texture((speed * i, 0), size) for i in range(frames)], dim=1) * 2 - 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("twins")
    return {name: str(build(root / name)) for name, build in NETWORKS.items()}


@pytest.mark.parametrize("shift", [(0.5, 0.25), (1, 0), (-2, 1), (4, 3), (-8, -4)])
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (130, 100)])
def test_the_flow_of_a_shifted_texture_is_the_shift(shift, size):
    flow = optical_flow(texture((0, 0), size), texture(shift, size))
    edge = 12  # what comes in from outside matches nothing
    error = (flow - torch.tensor(shift).view(2, 1, 1))[..., edge:-edge, edge:-edge].norm(dim=1)
    assert error.median() < 0.1


def test_a_large_frame_is_reduced_and_its_flow_with_it():
    flow = optical_flow(texture((0, 0), (256, 384)), texture((6, 0), (256, 384)))
    assert flow.shape[-2:] == (128, 192)
    assert flow[:, 0, 16:-16, 16:-16].median() == pytest.approx(3, abs=0.1)


def test_the_flow_agrees_with_opencv():
    """Farnebäck's method, on a picture that turns: the motion differs from place to place."""
    cv2 = pytest.importorskip("cv2")
    first = texture((0, 0), (96, 96))
    angle = torch.tensor(3.0).deg2rad()
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]])
    grid = torch.nn.functional.affine_grid(turn[None], [1, 3, 96, 96], align_corners=False)
    second = torch.nn.functional.grid_sample(first, grid, mode="bicubic", align_corners=False)
    grey = [cv2.cvtColor(to_bytes(image[0]), cv2.COLOR_RGB2GRAY) for image in (first, second)]
    expected = cv2.calcOpticalFlowFarneback(*grey, None, 0.5, 3, 15, 5, 7, 1.5, 0)
    found = optical_flow(first, second)[0].permute(1, 2, 0).numpy()
    inner = np.s_[16:-16, 16:-16]
    difference = np.linalg.norm(found[inner] - expected[inner], axis=-1)
    assert np.median(difference) < 0.15 < np.median(np.linalg.norm(expected[inner], axis=-1))


def to_bytes(image: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] → 8-bit [H, W, 3]."""
    return np.ascontiguousarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def test_a_frame_without_texture_stands_still():
    flat = torch.full((1, 3, 32, 32), 0.5)
    assert optical_flow(flat, flat + 0.1).abs().max() < 1e-3


def test_the_frame_between_two_is_half_way():
    middle = between(texture((0, 0)), texture((4, 0)))
    error = (middle - texture((2, 0))).abs()[..., 8:-8, 8:-8].mean()
    assert error < 0.1 * (texture((0, 0)) - texture((2, 0))).abs()[..., 8:-8, 8:-8].mean()


@pytest.mark.parametrize("name", [*NETWORKS, *OTHERS])
@pytest.mark.parametrize("size", [(33, 50), (50, 33), (9, 12)])
def test_a_frozen_clip_is_as_consistent_as_can_be_and_does_not_move(name, size, folders):
    still = texture((0, 0), size)[:, None].expand(-1, 4, -1, -1, -1) * 2 - 1
    output = build_reward(name, {"model": folders[name]} if name in folders else {})(still, ["a"])
    assert output.score.item() == pytest.approx(0 if name == "dynamic_degree" else 1, abs=1e-4)
    assert output.parts.get("dynamic", torch.zeros(1)).item() == 0


def test_one_is_the_motion_from_which_vbench_counts_a_pair_as_moving():
    threshold = 6 * 64 / 256
    for speed, verdict in ((0.8 * threshold, 0.0), (1.2 * threshold, 1.0)):
        output = build_reward("dynamic_degree")(moving(speed), ["a"])
        # The fastest twentieth is a little faster than the whole.
        assert speed / threshold * 0.98 < output.score.item() < speed / threshold * 1.15
        assert output.parts["dynamic"].item() == verdict


def test_a_quarter_of_the_frames_must_move():
    """By hand: 16 frames have 15 pairs, of which VBench wants 4 to move."""
    motions = torch.zeros(2, 15)
    motions[0, :3], motions[1, :4] = 2, 2
    assert is_dynamic(motions).tolist() == [False, True]


@pytest.mark.parametrize(
    ("count", "fps", "expected"),
    [
        (17, 24, range(0, 17, 3)),
        (16, 8, range(16)),
        (10, None, range(10)),
        (2, 24, range(2)),
        (61, 60, range(0, 61, 8)),
    ],
)
def test_motion_is_looked_at_eight_times_a_second(count, fps, expected):
    assert build_reward("dynamic_degree").sample_frames(count, fps).tolist() == list(expected)
    assert build_reward("temporal_flickering").sample_frames(count, fps).tolist() == list(range(count))


def test_flickering_is_vbench_s_mean_absolute_difference():
    frames = torch.stack([smooth_images(4, (20, 30), seed) for seed in (0, 1)])
    output = build_reward("temporal_flickering")(frames.float() / 127.5 - 1, ["a", "b"])
    pixels = frames.numpy().astype(np.float32)
    expected = [
        (255 - np.mean([np.abs(a - b).mean() for a, b in zip(v, v[1:], strict=False)])) / 255 for v in pixels
    ]
    np.testing.assert_allclose(output.score.numpy(), expected, rtol=1e-6)


def test_even_motion_is_smoother_than_jerky_motion():
    even = moving(1.5, 7)
    jerky = torch.cat([texture((x, 0))[:, None] for x in (0, 3, 3, 6, 6, 9, 9)], dim=1) * 2 - 1
    smooth, rough = (build_reward("motion_smoothness")(clip, ["a"]).score.item() for clip in (even, jerky))
    assert smooth > 0.97 > rough + 0.05


@torch.no_grad()
def reference_consistency(features: Tensor) -> float:
    """VBench's loop over the unit features [F, D] of one video."""
    total, cosine = 0.0, torch.nn.functional.cosine_similarity
    for i in range(1, len(features)):
        previous = max(0.0, cosine(features[i - 1 : i], features[i : i + 1]).item())
        first = max(0.0, cosine(features[:1], features[i : i + 1]).item())
        total += (previous + first) / 2
    return total / (len(features) - 1)


def shrunk(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """8-bit [3, H, W] resized without antialiasing, as torchvision does to a tensor: [3, h, w] in [0, 1]."""
    out = torch.nn.functional.interpolate(image[None].float(), size, mode=mode, align_corners=False)
    return out.round().clamp(0, 255)[0] / 255


@pytest.mark.parametrize("size", [(16, 16), (40, 72), (73, 40)])
@torch.no_grad()
def test_subject_consistency_follows_vbench(size, folders):
    images = smooth_images(5, size)
    short = 16 / min(size)
    new = tuple(16 if s == min(size) else int(s * short) for s in size)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = [(shrunk(i, new, "bilinear") - mean) / std for i in images]
    model = ViTModel.from_pretrained(folders["subject_consistency"], add_pooling_layer=False)
    hidden = model(torch.stack(pixels), interpolate_pos_encoding=True).last_hidden_state[:, 0]
    reward = build_reward("subject_consistency", {"model": folders["subject_consistency"]})
    score = reward(images[None].float() / 127.5 - 1, ["a"]).score.item()
    assert score == pytest.approx(reference_consistency(hidden), rel=2e-3)


@torch.no_grad()
def test_background_consistency_follows_vbench(folders):
    images = smooth_images(5, (40, 73))
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    left = round((29 - 16) / 2)
    pixels = [shrunk(i, (16, 29), "bicubic")[..., left : left + 16] for i in images]
    model = CLIPModel.from_pretrained(folders["background_consistency"])
    features = model.get_image_features(pixel_values=(torch.stack(pixels) - mean) / std).pooler_output
    reward = build_reward("background_consistency", {"model": folders["background_consistency"]})
    score = reward(images[None].float() / 127.5 - 1, ["a"]).score.item()
    assert score == pytest.approx(reference_consistency(features), rel=2e-3)
