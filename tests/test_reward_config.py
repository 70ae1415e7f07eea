"""Choosing scorers: names, arguments, mixtures, own files, and weights that are missing or not to be trusted."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from reward_twins import clip_folder, head_file, twin_arguments
from torch import Tensor, nn

from Core.backbones import Prompt
from Core.evaluation.metrics import score_videos
from Core.rewards import (
    REGISTRY,
    RewardInfo,
    RewardOutput,
    Weight,
    build_reward,
    check_reward_config,
    prompt_errors,
    register,
    required_weights,
    resolve_reward,
)
from Core.rewards.actpred import find_action
from Core.rewards.base import ImageReward
from Core.rewards.mixture import Mixture
from Core.rewards.settings import RewardSettings
from Core.utils import hub as weights_module
from Core.utils.state_dict import load_state

FRAMES = torch.rand(2, 2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
PROMPTS = ["a red fox", "two dogs"]
OWN_REWARD = """
from Core.rewards import ImageReward, RewardInfo

class Red(ImageReward):
    info = RewardInfo(name="red", summary="mean red", range="0 to 1")

    def __init__(self, *, gain: float = 1.0):
        super().__init__()
        self.gain = gain

    def score_images(self, images, prompts):
        return self.gain * images[:, 0].mean(dim=(1, 2))
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> dict[str, dict]:
    return twin_arguments(tmp_path_factory.mktemp("twins"))


def test_every_registered_name_is_a_documented_scorer(arguments):
    assert set(arguments) == set(REGISTRY)
    for name in REGISTRY:
        cls = resolve_reward(name)
        assert cls.info.name == name and cls.info.summary and cls.info.range and cls.__doc__
        assert check_reward_config(name, arguments[name]) == []


@pytest.mark.parametrize(
    ("reward_fn", "reward_args", "sentence"),
    [
        ("motion", {"device": "gpu"}, "device must be like 'cpu', 'cuda' or 'cuda:1', got 'gpu'"),
        ("asthetic", {}, "unknown reward 'asthetic': did you mean 'aesthetic'?"),
        (7, {}, "a reward is named by a string, got 7"),
        ("missing.py:Mine", {}, "there is no file 'missing.py'"),
        ("motion", {"taget": 1.0}, "reward_args of 'motion' have no 'taget': did you mean 'target'?"),
        ("motion", {"target": "much"}, "target must be a number or None, got 'much'"),
        ("motion", {"target": True}, "target must be a number or None, got True"),
        ("motion", {"slice_size": 0.5}, "slice_size must be a whole number, got 0.5"),
        ("hps", {"version": "v3"}, "version must be one of 'v2.0', 'v2.1', got 'v3'"),
        ("object_detection", {}, "'label' must be given (a string)"),
        ("pick_score", {"model": "./nowhere"}, "model: there is no './nowhere'; give a model folder"),
        ("pick_score", {"model": os.path.dirname(__file__)}, "it has no config.json"),
        ("aesthetic_hps", {"aesthetic": {"head": "no.pth"}}, "reward_args of 'aesthetic': head: there is no"),
        (
            "aesthetic_hps",
            {"slice_size": 0},
            "reward_args of 'aesthetic_hps': slice_size must be at least 1, got 0",
        ),
        ("aesthetic_hps", {"device": "gpu"}, "reward_args of 'aesthetic_hps': device must be like 'cpu'"),
        ({}, {}, "a reward mixture needs at least one part, got an empty dict"),
        ({"motion": 0}, {}, "weight of reward 'motion' must be a number above 0, got 0"),
        ({"motion": math.inf}, {}, "must be a number above 0, got inf"),
        ({"motion": 1.0, "wether": 1.0}, {}, "unknown reward 'wether': did you mean 'weather'?"),
        ({"motion": 1.0}, {"sharpness": {}}, "settings for 'sharpness', no part of the mixture (motion)"),
        ({"motion": 1.0}, {"motion": 0.1}, "reward_args of 'motion' in a mixture must be a dict"),
        ("hinge", {"target": 1.0}, "'reward' must be given (a string)"),
        (
            "hinge",
            {"reward": "motoin", "target": 1.0},
            "'hinge': reward: unknown reward 'motoin': did you mean",
        ),
        (
            "hinge",
            {"reward": "motion", "reward_args": {"taget": 1}, "target": 1.0},
            "reward_args of 'motion' have no 'taget'",
        ),
        ("relative", {"reward": "hps", "positive": "a"}, "'negative' must be given (a string)"),
        (
            "relative",
            {"reward": "hps", "positive": "a", "negative": " a"},
            "positive and negative are both 'a'",
        ),
        (
            {"hps": 1.0, "relative": 1.0},
            {"relative": {"reward": "hps", "positive": "a", "negative": "b"}},
            "rewards 'hps' and 'relative' of the mixture both hold 'hps'",
        ),
        (
            {"hps": 1.0, "aesthetic_hps": 1.0},
            {},
            "rewards 'hps' and 'aesthetic_hps' of the mixture both hold 'hps'",
        ),
    ],
)
def test_mistakes_are_named_before_anything_loads(reward_fn, reward_args, sentence):
    errors = check_reward_config(reward_fn, reward_args)
    assert any(sentence in error for error in errors), errors
    with pytest.raises(ValueError):
        build_reward(reward_fn, reward_args)


def test_all_mistakes_are_reported_at_once():
    errors = check_reward_config(
        {"motion": -1, "pick_scor": 1.0, "aesthetic": 1.0}, {"aesthetic": {"model": "./a", "head": "b.pth"}}
    )
    assert len(errors) == 4


def test_mixture_weights_the_sum_and_logs_its_parts_unweighted(arguments):
    weights = {"pick_score": 2.0, "compression": 0.5}
    mixture = build_reward(weights, {name: arguments[name] for name in weights})(FRAMES, PROMPTS)
    pick, size = (build_reward(name, arguments[name])(FRAMES, PROMPTS) for name in weights)
    torch.testing.assert_close(mixture.loss, 2.0 * pick.loss + 0.5 * size.loss)
    torch.testing.assert_close(mixture.score, 2.0 * pick.score - 0.5 * size.score)  # a smaller file is better
    torch.testing.assert_close(
        mixture.parts, {"pick_score": pick.score.detach(), "compression": size.score.detach()}
    )


def test_wrappers_answer_for_the_reward_inside(arguments):
    own = {"reward": "actpred", "reward_args": arguments["actpred"], "target": 0.5}
    assert required_weights("hinge", own) == required_weights("actpred", arguments["actpred"])
    assert required_weights("hinge") == []
    assert resolve_reward("hinge").scorers(own) == ("actpred",) and resolve_reward("hinge").scorers() == ()
    (error,) = prompt_errors({"hinge": 1.0, "sharpness": 1.0}, {"hinge": own}, ["a cloud", "a bike"])
    assert "in the prompt 'a cloud'" in error
    words = {"positive": "a man is riding", "negative": "no"}
    relative = {"reward": "actpred", "reward_args": arguments["actpred"], **words}
    (error,) = prompt_errors("relative", relative, ["a horse"])
    assert "in the prompt 'no a horse'" in error


def test_a_scorer_stays_on_the_device_it_is_given(arguments):
    """The run's device here is torch's "meta", where nothing can be computed."""
    parts = {"pick_score": 1.0, "hinge": 0.5}
    inner = arguments["clip_score"] | {"device": "cpu"}
    args = {
        "pick_score": arguments["pick_score"] | {"device": "cpu"},
        "hinge": {"reward": "clip_score", "reward_args": inner, "target": 1e3},
    }
    reward = build_reward(parts, args, device="meta")
    frames = torch.zeros(1, 1, 3, 16, 16, requires_grad=True)
    output = reward(frames, ["a fox"])
    assert output.score.isfinite() and torch.autograd.grad(output.loss.sum(), frames)[0].any()
    assert build_reward("pick_score", arguments["pick_score"], device="meta").device.type == "meta"


class Weighted(ImageReward):
    """A reward with a weight, which lies somewhere."""

    info = RewardInfo(name="weighted", summary="a mean", range="any")

    def __init__(self, device: str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, device=device))

    def evaluate(self, frames: Tensor, prompts: list[str]) -> RewardOutput:
        assert frames.device == self.weight.device
        return RewardOutput(torch.zeros(1), torch.zeros(1), {})


@pytest.mark.parametrize("devices", [("meta", "cpu"), ("cpu", "meta")])
def test_each_part_of_a_mixture_scores_videos_where_its_weights_are(devices):
    parts = {str(number): Weighted(device) for number, device in enumerate(devices)}
    mixture = Mixture(parts, dict.fromkeys(parts, 1.0))
    output = score_videos(mixture, torch.zeros(1, 3, 4, 16, 16), [Prompt("a fox")])
    assert output.score.device.type == "cpu"


@pytest.mark.skipif(torch.cuda.device_count() > 9, reason="the device would be there")
def test_a_device_that_is_not_there_is_named(arguments):
    with pytest.raises(ValueError, match="is to run on 'cuda:9', but this machine has"):
        build_reward("pick_score", arguments["pick_score"] | {"device": "cuda:9"})


def test_wrappers_enter_a_mixture(arguments):
    names = {"hinge": 2.0, "relative": 1.0, "motion": 1.0}
    args = {name: arguments[name] for name in names}
    output = build_reward(names, args)(FRAMES, PROMPTS)
    parts = {name: build_reward(name, args[name])(FRAMES, PROMPTS) for name in names}
    torch.testing.assert_close(output.loss, sum(w * parts[name].loss for name, w in names.items()))
    assert list(output.parts) == ["clip_score", "pick_score", "relative", "motion"]


def test_hps_version_reaches_each_hps_reward():
    def arguments_of(reward_fn, **reward_args):
        settings = RewardSettings(reward_fn=reward_fn, reward_args=reward_args, hps_version="v2.0")
        return settings.arguments

    version = {"version": "v2.0"}
    own = {"version": "v2.1"}
    assert arguments_of("hps") == version and arguments_of("hps", **own) == own
    assert arguments_of("aesthetic_hps") == {"hps": version}
    assert arguments_of("motion", target=1) == {"target": 1}
    assert arguments_of({"hps": 1, "motion": 1}) == {"hps": version}
    assert arguments_of({"hps": 1, "motion": 1}, hps=own, motion={}) == {"hps": own, "motion": {}}
    assert arguments_of({"aesthetic_hps": 1}) == {"aesthetic_hps": {"hps": version}}
    assert arguments_of("hinge", reward="hps", target=1) == {
        "reward": "hps",
        "reward_args": version,
        "target": 1,
    }
    nested = {"reward": "relative", "reward_args": {"reward": "hps", "reward_args": version}}
    assert arguments_of("hinge", reward="relative", reward_args={"reward": "hps"}) == nested
    assert arguments_of({"hps": 1}, hps=0.1) == {"hps": 0.1}  # refused later, with all other mistakes


def test_own_scorer_from_a_file(tmp_path):
    file = tmp_path / "my rewards.py"
    file.write_text(OWN_REWARD)
    reward = build_reward(f"{file}:Red", {"gain": 2.0})
    torch.testing.assert_close(reward(FRAMES, PROMPTS).score, (FRAMES[:, :, 0] + 1).mean((1, 2, 3)))
    assert list(build_reward({f"{file}:Red": 1.0, "motion": 1.0})(FRAMES, PROMPTS).parts) == ["red", "motion"]
    assert "have no 'gian': did you mean 'gain'?" in check_reward_config(f"{file}:Red", {"gian": 1})[0]
    assert "has no class 'Blue' derived from" in check_reward_config(f"{file}:Blue")[0]
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    assert (
        "fails on import at line 1: ModuleNotFoundError"
        in check_reward_config(f"{tmp_path / 'broken.py'}:Red")[0]
    )


def test_registering_a_name_twice_is_refused(monkeypatch):
    class Flat(ImageReward):
        info = RewardInfo(name="flat", summary="constant", range="0")

    monkeypatch.delitem(REGISTRY, "flat", raising=False)
    register("flat", Flat)
    assert resolve_reward("flat") is Flat
    with pytest.raises(ValueError, match="a reward named 'flat' exists already"):
        register("flat", Flat)
    del REGISTRY["flat"]


ACTIONS = ["riding a bike", "playing guitar", "bike", "playing", "riding or walking with horse", "crying"]
ACTIONS += ["running on treadmill", "tying bow tie", "making pizza", "brushing teeth", "singing"]


@pytest.mark.parametrize(
    ("prompt", "action"),
    [
        ("Playing guitar", "playing guitar"),
        ("bike", "bike"),
        ("A man on a bike, riding through a city.", "riding a bike"),
        ("children playing", "playing"),
        ("a man rides a bike", "riding a bike"),
        ("two people play guitar", "playing guitar"),
        ("She rides her two bikes", "riding a bike"),
        ("a horse runs on a treadmill", "running on treadmill"),
        ("Someone ties a bow tie.", "tying bow tie"),
        ("a chef makes pizzas", "making pizza"),
        ("he brushes his teeth", "brushing teeth"),
        ("a child cries", "crying"),
        ("a girl sings", "singing"),
    ],
)
def test_action_is_found_in_the_prompt(prompt, action):
    assert find_action(prompt, ACTIONS) == action


@pytest.mark.parametrize("prompt", ["a cute watermelon", "a caress", "the a"])
def test_words_that_only_look_alike_are_no_action(prompt):
    with pytest.raises(ValueError, match="no action class occurs in the prompt"):
        find_action(prompt, ["cutting watermelon", "caring", "the"])


def test_prompts_without_an_action_are_listed_before_training(arguments):
    own = arguments["actpred"]
    (error,) = prompt_errors("actpred", own, ["riding a bike", "a guitar on a wall"])
    assert "no action class occurs in the prompt 'a guitar on a wall'; near: playing guitar" in error
    unusable = ["a guitar on a wall", "a cloud"]
    assert len(prompt_errors({"actpred": 1.0, "motion": 1.0}, {"actpred": own}, unusable)) == 2
    assert prompt_errors("actpred", own | {"action": "swimming"}, unusable) == []
    assert "in the prompt 'skating'" in prompt_errors("actpred", own | {"action": "skating"}, unusable)[0]
    assert prompt_errors("motion", None, unusable) == []


def test_unknown_object_names_the_nearest_class(arguments):
    with pytest.raises(ValueError, match="no 'dogs': did you mean 'dog'"):
        build_reward("object_detection", arguments["object_detection"] | {"label": "dogs"})


def test_head_for_another_clip_is_refused(tmp_path):
    clip = clip_folder(tmp_path / "clip")
    head = head_file(tmp_path / "head.pth", (7, 4, 1), (0, 2))
    with pytest.raises(ValueError, match="head.pth takes 7 features but the CLIP model gives 12"):
        build_reward("aesthetic", {"model": str(clip), "head": str(head)})
    torch.save({"decoder": torch.zeros(3)}, head)
    with pytest.raises(ValueError, match=r"head.pth is no head: .* got decoder \[3\]"):
        build_reward("aesthetic", {"model": str(clip), "head": str(head)})


def test_heads_load_from_safetensors_too(tmp_path, arguments):
    from safetensors.torch import save_file

    save_file(torch.load(arguments["aesthetic"]["head"], weights_only=True), tmp_path / "head.safetensors")
    same = build_reward("aesthetic", arguments["aesthetic"] | {"head": str(tmp_path / "head.safetensors")})
    expected = build_reward("aesthetic", arguments["aesthetic"])(FRAMES, PROMPTS).score
    torch.testing.assert_close(same(FRAMES, PROMPTS).score, expected, rtol=0, atol=0)


class Malicious:
    """Unpickling an instance would create a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))]
)
def test_malicious_pickle_is_refused_and_not_run(tmp_path, save, arguments):
    trace = tmp_path / "trace"
    save({"layers.0.weight": Malicious(trace)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match="refused to load .*head.pth"):
        build_reward("aesthetic", arguments["aesthetic"] | {"head": str(tmp_path / "head.pth")})
    with pytest.raises(ValueError, match="refused to load .*head.pth"):
        load_state(tmp_path / "head.pth")
    assert not trace.exists()


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"layers": {"0": torch.zeros(1)}}, {"step": 3}])
def test_a_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "head.pt")
    with pytest.raises(ValueError, match="refused to load .*head.pt: .* without tensors by name"):
        load_state(tmp_path / "head.pt")


def test_damaged_safetensors_are_refused(tmp_path):
    (tmp_path / "head.safetensors").write_bytes(b"half of a download")
    with pytest.raises(ValueError, match="refused to load .*head.safetensors: it is damaged"):
        load_state(tmp_path / "head.safetensors")


@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("tokenizer.json", "it has no tokenizer.json or spiece.model or vocab.json with merges.txt"),
        ("preprocessor_config.json", "it has no preprocessor_config.json or"),
    ],
)
def test_a_half_downloaded_folder_is_not_complete(tmp_path, lost, sentence):
    clip = clip_folder(tmp_path / "clip")
    (clip / lost).unlink()
    (error,) = check_reward_config("pick_score", {"model": str(clip)})
    assert sentence in error


def test_each_weather_has_a_published_head_of_its_own():
    heads = {name: required_weights(name)[1] for name in ("rainy", "snowy")}
    assert [head.file for head in heads.values()] == ["rainy_reward.pt", "snowy_reward.pt"]
    assert heads["rainy"].sha256.startswith("bfa1e0f3") and heads["snowy"].sha256.startswith("dae251d2")
    for kind, head in heads.items():
        assert required_weights("weather", {"kind": kind})[1] == head
    assert required_weights("weather")[1] == heads["rainy"]
    assert required_weights("weather", {"kind": "snowy", "head": "own.pt"})[1].sha256 == ""


def test_a_copy_of_a_pinned_file_in_the_current_folder_is_taken_if_it_is_the_published_one(
    tmp_path, monkeypatch
):
    def unreachable(url, target, hash_prefix):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    copy = head_file(tmp_path / "rainy_reward.pt", (12, 8, 1), (0, 2))
    published = required_weights("rainy")[1]
    with pytest.raises(FileNotFoundError, match="no route"):
        weights_module.locate(published)
    own = dataclasses.replace(published, sha256=weights_module.sha256(copy))
    assert weights_module.locate(own) == Path("rainy_reward.pt")


def test_a_hub_that_cannot_be_reached_names_repository_size_and_cure_and_is_not_cut(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    words = [f"word{i}" for i in range(60)] + ["HF_HUB_OFFLINE=0"]
    for reason in (" ".join(words[-20:]), " ".join(words)):

        def unreachable(*args, reason=reason, **kwargs):
            raise OSError(f"{reason}\nsecond line")

        monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
        with pytest.raises(FileNotFoundError) as raised:
            weights_module.locate(required_weights("pick_score")[0])
        message = str(raised.value)
        assert (
            "yuvalkirstain/PickScore_v1, about 3.9 GB" in message and "`vader download --to DIR`" in message
        )
        told = [word.strip(",;:().") for word in message.split()]
        cut = [word for word in told if word.startswith(("word", "HF_")) and word not in words]
        assert not cut and ("HF_HUB_OFFLINE=0" in told) == (reason == " ".join(words[-20:]))
        assert "second" not in message


def test_missing_weights_are_reported_together_with_size_and_command(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise weights_module.UnreachableError("no route to the hub")

    monkeypatch.setattr(weights_module, "_from_hub", unreachable)
    monkeypatch.setattr(weights_module, "_from_address", unreachable)
    with pytest.raises(FileNotFoundError) as raised:
        build_reward({"pick_score": 1.0, "aesthetic": 0.1})
    message = str(raised.value)
    for part in (
        "yuvalkirstain/PickScore_v1, about 3.9 GB, named by argument 'model' of reward 'pick_score'",
        "openai/clip-vit-large-patch14, about 1.7 GB",
        "linearMSE.pth",
        "no route to the hub",
        "`vader download --to DIR`",
    ):
        assert part in message


def test_required_weights_follow_the_arguments(arguments):
    sources = [weight.source for weight in required_weights("aesthetic_hps", {"hps": {"version": "v2.1"}})]
    assert "openai/clip-vit-large-patch14" in sources and "xswu/HPSv2" in sources
    (hps, _) = required_weights("hps", {"version": "v2.1"})
    assert hps.file == "HPS_v2.1_compressed.pt"
    assert required_weights("clip_score", {"model": "open_clip:ViT-B-32/openai"}) == []
    assert required_weights({"motion": 1.0, "sharpness": 1.0}) == []


@pytest.mark.parametrize("name", ["aesthetic_hps", "relative", "hinge"])
def test_rewards_around_others_pass_on_what_every_scorer_takes(arguments, name):
    """Those inside keep what they were given themselves."""
    inner = "hps" if name == "aesthetic_hps" else "reward_args"
    for given, expected in (({}, (5, "meta")), ({"slice_size": 2, "device": "cpu"}, (2, "cpu"))):
        args = {**arguments[name], inner: {**arguments[name][inner], **given}}
        reward = build_reward(name, args | {"slice_size": 5, "device": "meta"})
        parts = list(reward.rewards) if name == "aesthetic_hps" else [reward.inner]
        assert (parts[-1].slice_size, parts[-1].device.type) == expected
        assert all((part.slice_size, part.device.type) == (5, "meta") for part in parts[:-1])


def test_paths_and_hub_ids_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    for source in ("owner/model", "./x", "/x", "~/x", "a/b/c", "name", "head.pth", "x.safetensors"):
        assert Weight(source=source).is_local, source
    for source in ("owner/other", "https://example.org/head.pth"):
        assert not Weight(source=source).is_local, source
