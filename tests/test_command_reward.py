"""Rewards without a gradient: a program that scores a folder of videos, plain numbers, the demo's oracle."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from Core.rewards import ImageReward, RewardInfo, build_reward, check_reward_config
from Core.rewards.build import parts_without_gradient
from scripts.demo import world
from scripts.demo.common import to_pixels

ROOT = Path(__file__).resolve().parents[1]
ORACLE = f"{ROOT / 'scripts' / 'demo' / 'oracle_reward.py'}:Oracle"
SCRIPT = """
import csv, json, pathlib, sys, time
folder = pathlib.Path(sys.argv[-1])
prompts = json.loads((folder / "prompts.json").read_text())
assert all((folder / file).stat().st_size for file in prompts)
scores = {file: len(prompt) for file, prompt in prompts.items()}
"""


def scored(tmp_path: Path, ending: str, **args) -> list[float]:
    """Scores of two clips by the script with these last lines."""
    script = tmp_path / "score.py"
    script.write_text(SCRIPT + ending)
    reward = build_reward("command", {"command": f"{sys.executable} '{script}'", **args})
    return reward(torch.zeros(2, 3, 3, 16, 16), ["a", "abc"]).score.tolist()


@pytest.mark.parametrize(
    "ending",
    [
        "(folder / 'scores.json').write_text(json.dumps(scores))",
        "table = csv.writer(open(folder / 'scores.csv', 'w'))\n"
        "table.writerows([('file', 'score'), *scores.items()])",
    ],
)
def test_a_program_scores_a_folder_of_videos(tmp_path, ending):
    assert scored(tmp_path, ending) == [1, 3]
    assert scored(tmp_path, ending, slice_size=1) == [1, 3]


@pytest.mark.parametrize(
    ("ending", "sentence"),
    [
        ("sys.exit('no GPU')", "failed with exit status 1: no GPU"),
        ("", "wrote neither scores.json nor scores.csv"),
        ("(folder / 'scores.json').write_text('[1, 2]')", "write scores.json as {file: number}"),
        (
            "(folder / 'scores.json').write_text('{\"0000.mp4\": 1}')",
            r"gave no score for 0001.mp4 \(1 of 2 videos\)",
        ),
        ("(folder / 'scores.csv').write_text('name,score')", "gave no score for 0000.mp4"),
        ("(folder / 'scores.csv').write_text('file,score\\na,b')", "could not convert string to float"),
        ("time.sleep(9)", "took more than 1 seconds; raise timeout"),
    ],
)
def test_a_program_that_fails_is_named_with_its_reason(tmp_path, ending, sentence):
    with pytest.raises(ValueError, match=sentence):
        scored(tmp_path, ending, timeout=1)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({}, "'command' must be given"),
        ({"command": "no_such_program --flag"}, "there is no program 'no_such_program'"),
        ({"command": ""}, "command must not be empty"),
        ({"command": "a 'b"}, "cannot be read: No closing quotation"),
        ({"command": "true", "timeout": 0}, "timeout must be above 0, got 0"),
    ],
)
def test_its_arguments_are_checked_before_it_runs(args, sentence):
    assert any(sentence in error for error in check_reward_config("command", args))


class Numbers(ImageReward):
    info = RewardInfo(name="numbers", summary="", range="")

    def score_images(self, images, prompts):
        return [float(image.mean()) for image in images]


def test_a_scorer_may_return_plain_numbers():
    output = Numbers()(torch.zeros(2, 2, 3, 8, 8, requires_grad=True), ["a", "b"])
    assert output.score.tolist() == [0.5, 0.5] and output.loss.dtype == torch.float32
    assert not output.loss.requires_grad


def test_the_oracle_is_a_reward():
    scenes = [world.scene(0, index) for index in range(3)]
    captions = [world.caption(scene, 0) for scene in scenes]
    frames = to_pixels(np.stack([world.render(scene) for scene in scenes]))
    reward = build_reward(ORACLE)
    assert len(reward.sample_frames(17, 24)) == 17
    assert reward(frames, captions).score.tolist() == [1, 1, 1]
    assert reward(torch.zeros_like(frames), captions).score.tolist() == [0, 0, 0]


def test_what_has_no_gradient_is_known_through_wrappers_and_mixtures():
    hinge = {"reward": ORACLE, "target": 1.0}
    assert parts_without_gradient("hinge", hinge) == ["hinge"]
    assert parts_without_gradient({ORACLE: 1.0, "motion": 1.0}, {}) == [ORACLE]
    assert parts_without_gradient("motion", {}) == []
