"""The demo world: the generator is deterministic, captions say what is shown, and the oracle reads it back."""

import numpy as np
import pytest

from scripts.demo import oracle, world


def test_scenes_are_a_function_of_seed_index_and_split():
    assert world.scene(1, 2) == world.scene(1, 2)
    assert world.scene(1, 2) != world.scene(1, 3)
    assert world.scene(1, 2) != world.scene(2, 2)
    assert world.scene(1, 2) != world.scene(1, 2, "test")
    video = world.render(world.scene(1, 2))
    assert video.shape == (17, 64, 64, 3) and video.dtype == np.uint8
    assert np.array_equal(video, world.render(world.scene(1, 2)))
    assert np.array_equal(video[[3, 9]], world.render(world.scene(1, 2), [3, 9]))


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'test'"):
        world.scene(0, 0, "validation")


def test_shapes_stay_inside_the_picture():
    for i in range(200):
        scene = world.scene(5, i)
        dx, dy = world.DIRECTIONS[scene.direction]
        for t in (0, world.FRAMES - 1):
            centre = np.array(scene.start) + scene.speed * t * np.array([dx, dy])
            assert (centre >= scene.size / 2).all() and (centre <= world.SIDE - scene.size / 2).all()


def test_held_out_combinations_are_not_trained_on_but_their_pairs_are():
    def attributes(scene):
        return scene.shape, scene.colour, scene.background, scene.direction

    train = {attributes(world.scene(0, i)) for i in range(1500)}
    test = {attributes(world.scene(0, i, "test")) for i in range(200)}
    assert not train & test
    for a, b in ((0, 1), (0, 3), (1, 3)):
        assert {(x[a], x[b]) for x in test} <= {(x[a], x[b]) for x in train}


def test_captions_parse_back_to_their_scene():
    for i in range(400):
        scene = world.scene(3, i)
        text = world.caption(scene, i)
        assert text == text.lower()
        said = world.parse_caption(text)
        assert said == {
            name: getattr(scene, name) for name in ("shape", "colour", "background", "direction")
        }, text


def test_wordings_vary():
    scene = world.scene(0, 0)
    assert len({world.caption(scene, wording) for wording in range(300)}) > 70


def test_noisy_captions_are_wrong_as_often_as_asked_and_only_in_colour_or_shape():
    rng, wrong = np.random.default_rng(0), []
    for i in range(600):
        scene = world.scene(9, i)
        said = world.parse_caption(world.noisy_caption(scene, rng, 0.35))
        assert said["direction"] == scene.direction and said["background"] == scene.background
        wrong.append((said["colour"] != scene.colour) + (said["shape"] != scene.shape))
    assert max(wrong) == 1
    assert abs(np.mean(wrong) - 0.35) < 0.06


def test_oracle_reads_true_videos():
    hits = 0
    for i in range(150):
        scene = world.scene(21, i, "test")
        seen = oracle.read(world.render(scene))
        hits += seen == {"colour": scene.colour, "shape": scene.shape, "direction": scene.direction}
    assert hits >= 149


def test_oracle_survives_noise_and_dim_colours():
    rng, hits = np.random.default_rng(0), 0
    for i in range(40):
        scene = world.scene(22, i, "test")
        video = world.render(scene) * 0.8 + rng.normal(0, 6, (17, 64, 64, 3))
        seen = oracle.read(video.clip(0, 255).astype(np.uint8))
        hits += seen == {"colour": scene.colour, "shape": scene.shape, "direction": scene.direction}
    assert hits >= 38


def test_oracle_finds_nothing_in_a_grey_video():
    assert oracle.read(np.full((17, 64, 64, 3), 120, np.uint8)) is None


def test_oracle_sees_that_a_still_shape_does_not_move():
    video = np.repeat(world.render(world.scene(0, 4), [8]), world.FRAMES, axis=0)
    assert oracle.read(video)["direction"] is None


def test_a_shape_turns_round_at_the_border_and_stays_inside():
    scene = world.scene(0, 3)
    x, y = world.centres(scene, range(200))
    for places in (x, y):
        assert places.min() >= scene.size / 2 and places.max() <= world.SIDE - scene.size / 2
    steps = np.abs(np.diff(x)) + np.abs(np.diff(y))
    assert np.isclose(steps, scene.speed).mean() > 0.9 and steps.max() <= scene.speed + 1e-9
    assert (np.diff(np.sign(np.diff(x if scene.direction in ("left", "right") else y))) != 0).any()
