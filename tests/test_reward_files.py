"""Reward files of users: each way to get one wrong is a sentence that names file, class and what to change."""

from pathlib import Path

import pytest
import torch
import twin_runs

from Core.rewards import build_reward, check_reward_config
from Core.rewards.user_files import try_scorer

HEAD = """import sys
import torch
from Core.rewards import ImageReward, Reward, RewardInfo, RewardOutput, VideoReward

class Mine({base}):
    info = RewardInfo(name="mine", summary="mine", range="any")
"""
SCORE = "    def score_images(self, images, prompts):\n        "
GOOD = SCORE + "return images.mean((1, 2, 3))\n"
FRAMES, PROMPTS = torch.rand(2, 2, 3, 8, 8) * 2 - 1, ["a fox", "a bird"]


def reward_file(folder: Path, body: str, base: str = "ImageReward") -> str:
    file = folder / "mine.py"
    file.write_text(HEAD.format(base=base) + body)
    return f"{file}:Mine"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("    info = None\n" + GOOD, "it must have info = RewardInfo("),
        ("    info = dict(name='mine')\n" + GOOD, "it must have info = RewardInfo("),
        ("", "it must define score_images(self, images, prompts)"),
        ("    def score_images(self, images): pass", "must be score_images(self, images, prompts), got"),
        ("    def score_images(self, a, b, c): pass", "must be score_images(self, images, prompts), got"),
        (GOOD + "    def loss(self): pass", "its loss must be loss(self, raw), got loss(self)"),
        (
            GOOD + "    def __init__(self, bright): pass",
            "must be __init__(self, *, bright), with keyword-only",
        ),
        (GOOD + "sys.exit(0)", "fails on import at line 9: SystemExit: 0; mend the file"),
        (GOOD + "1 / 0", "fails on import at line 9: ZeroDivisionError: division by zero; mend the file"),
        (
            GOOD + "    @classmethod\n    def config_errors(cls, args): return args['no']",
            "fails on its arguments at line 10: KeyError: 'no'; mend the file",
        ),
        (GOOD + "    def __init__(self, *, a: 'Nowhere' = 1): pass", "fails on its arguments: NameError"),
    ],
)
def test_what_shows_without_running_a_scorer(tmp_path, body, told):
    name = reward_file(tmp_path, body)
    (sentence,) = check_reward_config(name)
    assert str(tmp_path / "mine.py") in sentence and told in sentence


@pytest.mark.parametrize(
    ("body", "base", "told"),
    [
        (SCORE + "return images.numpy()", "ImageReward", "at line 8: RuntimeError: Can't call numpy()"),
        (SCORE + "raise KeyError('fox')", "ImageReward", "while scoring at line 8: KeyError: 'fox'; mend"),
        (SCORE + "assert False", "ImageReward", "at line 8: AssertionError: no reason given; mend the file"),
        (SCORE + "sys.exit(0)", "ImageReward", "while scoring at line 8: SystemExit: 0; mend the file"),
        (SCORE + "return images.mean()", "ImageReward", "must give one score and one loss per image"),
        (
            "    min_frames = 9\n    def score_clips(self, c, p): pass",
            "VideoReward",
            "at least 9 frames, got 2",
        ),
        (
            "    def evaluate(self, f, p): return f.mean((1, 2, 3, 4))",
            "Reward",
            "must give a score for each video",
        ),
        (
            "    def evaluate(self, f, p):\n"
            "        from Core.rewards import RewardOutput\n"
            "        return RewardOutput(f.mean((1, 2, 3, 4)), -f.mean((1, 2, 3, 4)), None)",
            "Reward",
            "must give its parts as a dict, got NoneType",
        ),
    ],
)
def test_what_shows_on_a_clip(tmp_path, body, base, told):
    name = reward_file(tmp_path, body, base)
    scorer = build_reward(name)
    with pytest.raises(ValueError) as error:
        try_scorer(scorer, FRAMES, PROMPTS, needs_gradient=True)
    assert str(tmp_path / "mine.py:Mine") in str(error.value) and told in str(error.value)


def test_a_constructor_that_fails_is_named(tmp_path):
    name = reward_file(tmp_path, GOOD + "    def __init__(self): raise OSError('no such weights')")
    with pytest.raises(
        ValueError, match=r"mine.py:Mine' fails in its constructor at line 9: OSError: no such"
    ):
        build_reward(name)


def test_a_good_scorer_passes_and_does_not_notice(tmp_path):
    body = SCORE + "self.calls = getattr(self, 'calls', 0) + 1; return images.mean((1, 2, 3))"
    scorer = build_reward(reward_file(tmp_path, "    calls = 0\n" + body))
    scorer.calls = 3
    assert try_scorer(scorer, FRAMES, PROMPTS, needs_gradient=True)
    assert scorer.calls == 3


@pytest.mark.parametrize("score", ["images.detach().mean((1, 2, 3))", "torch.tensor([1.0] * len(prompts))"])
def test_a_score_without_a_gradient_shows(tmp_path, score):
    scorer = build_reward(reward_file(tmp_path, SCORE + f"return {score}"))
    assert not try_scorer(scorer, FRAMES, PROMPTS, needs_gradient=True)


def test_an_objective_without_the_reward_s_gradient_takes_any_score(tmp_path):
    scorer = build_reward(reward_file(tmp_path, SCORE + "return images.round().detach().mean((1, 2, 3))"))
    assert try_scorer(scorer, FRAMES, PROMPTS, needs_gradient=False)


@pytest.mark.parametrize("inside", ["{}", "mixture", "hinge"])
def test_a_fault_stops_a_run_before_its_first_step(twin, tmp_path, capfd, inside):
    name = reward_file(tmp_path, SCORE + "return images.detach().mean((1, 2, 3))")
    keys = {
        "{}": dict(reward_fn=name, reward_args={}),
        "mixture": dict(reward_fn={name: 1.0, "saturation": 1.0}, reward_args={}),
        "hinge": dict(reward_fn="hinge", reward_args=dict(reward=name, target=1.0)),
    }[inside]
    assert twin_runs.start(twin, tmp_path / "run", **keys) == 2
    printed = capfd.readouterr().err
    assert (
        f"error: reward {name!r} has no gradient with respect to the frames" in printed
        and "Traceback" not in printed
    )
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_monitor_needs_no_gradient_but_must_not_fail(twin, tmp_path, capfd):
    name = reward_file(tmp_path, SCORE + "sys.exit(0)")
    assert twin_runs.start(twin, tmp_path / "run", monitors=[name]) == 2
    assert "fails while scoring at line 8: SystemExit: 0" in capfd.readouterr().err


def test_a_gradient_of_zero_stops_the_run(twin, tmp_path, capfd):
    name = reward_file(tmp_path, SCORE + "return images.round().mean((1, 2, 3))")
    keys = dict(reward_fn=name, reward_args={}, max_bad_steps=2, max_train_steps=5)
    assert twin_runs.start(twin, tmp_path / "run", **keys) == 2
    (sentence,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "the gradient of 2 steps in a row was exactly zero; the run is saved at step 2; " in sentence
    assert "look for rounding, thresholds" in sentence
