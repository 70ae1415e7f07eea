"""The committed demo models: they load through the real loaders and do what the quickstart needs of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from Core.rewards import build_reward
from scripts.demo import measure, world
from scripts.demo.common import ASSETS, heldout, to_pixels


@pytest.fixture(scope="module")
def models():
    return measure.Models()


@pytest.fixture(scope="module")
def scenes_and_captions():
    return heldout(16)


def videos(scenes):
    return to_pixels(np.stack([world.render(scene) for scene in scenes])).transpose(1, 2)


def test_assets_stay_small():
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) <= 25e6


@pytest.mark.parametrize("folder", ["t5", "clip"])
def test_transformers_4_can_read_the_tokenizers(folder):
    """It fails on a list of extra special tokens."""
    config = json.loads((ASSETS / folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "extra_special_tokens" not in config


def test_heldout_prompts_are_the_heldout_scenes():
    lines = (ASSETS / "prompts_heldout.txt").read_text(encoding="utf-8").splitlines()
    assert lines == heldout(len(lines))[1] and len(lines) == 256


def test_normalised_latents_have_unit_spread(models, scenes_and_captions):
    with torch.no_grad():
        z = models.vae.encode(videos(scenes_and_captions[0]))
    assert z.shape == (16, 4, 5, 8, 8)
    assert (z.std((0, 2, 3, 4)) - 1).abs().max() < 0.25


def test_the_oracle_reads_what_the_vae_decodes(models, scenes_and_captions):
    scenes, captions = scenes_and_captions
    with torch.no_grad():
        decoded = models.decode(models.vae.encode(videos(scenes)))
    seen = measure.accuracy(decoded, captions)
    assert seen["both"] >= 15 / 16 and seen["direction"] >= 15 / 16


def test_a_latent_frame_decoded_alone_looks_like_the_last_of_its_frames(models, scenes_and_captions):
    truth = videos(scenes_and_captions[0][:4])
    with torch.no_grad():
        z = models.vae.encode(truth)
        alone = torch.cat([models.vae.decode(z[:, :, k : k + 1], num_frames=1) for k in range(5)], dim=2)
    assert (alone - truth[:, :, ::4]).abs().mean() < 0.06


def test_pick_score_gives_partial_credit(scenes_and_captions):
    scenes, captions = scenes_and_captions
    reward = build_reward("pick_score", {"model": str(ASSETS / "clip")})
    frames, rng = videos(scenes).transpose(1, 2)[:, [0, 8, 16]], np.random.default_rng(0)

    def mean_score(change):
        told = [world.caption(change(scene), 7 + i) for i, scene in enumerate(scenes)]
        with torch.no_grad():
            return float(reward(frames, told).score.mean())

    def both(scene):
        wrong = world.wrong_attribute(scene, rng, "shape")
        return replace(scene, colour=world.wrong_attribute(scene, rng, "colour").colour, shape=wrong.shape)

    right = mean_score(lambda scene: scene)
    one = max(mean_score(lambda s, a=a: world.wrong_attribute(s, rng, a)) for a in ("colour", "shape"))
    assert right > 75 and one < 60 and mean_score(both) < 15


def test_base_model_follows_most_prompts_and_leaves_headroom(models):
    captions = heldout(24)[1]
    z = models.generate(captions, steps=12, guidance=1.75, seed=0)
    seen = measure.accuracy(models.decode(z), captions)
    assert 0.3 < seen["both"] < 0.95 and seen["direction"] > 0.5
