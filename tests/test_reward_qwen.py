"""`videoalign` and `hpsv3` against the scores and pixel gradients of the authors' code, and what they refuse.

The twins in tests/golden/rewards have the published layouts at small sizes.

Axes: B clips, F frames, 3 channels, H rows, W columns.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import twin_runs
from reward_twins import QWEN2_VL, qwen2_vl_arguments
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from Core.backbones import Prompt
from Core.data.video import frame_rate, save_video
from Core.evaluation import metrics
from Core.rewards import build_reward, check_reward_config, required_weights
from Core.rewards import hpsv3 as hpsv3_module
from Core.rewards import videoalign as videoalign_module
from Core.rewards.build import prompt_errors
from Core.rewards.mixture import Mixture
from Core.rewards.qwen2_vl import Patches, smart_resize
from Core.rewards.qwen2_vl_files import PromptFile, read_template

NAMES = ("videoalign", "hpsv3")
PROMPTS = ["a red ball", "a dog walks over a field of grass"]


def golden(name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Inputs and outputs of the authors' code, and the prompts."""
    path = QWEN2_VL / name / "golden.safetensors"
    with safe_open(str(path), "pt") as file:
        return load_file(path), json.loads(file.metadata()["prompts"])


def clip(data: dict[str, Tensor], i: int) -> Tensor:
    """Clip i of `videoalign`'s golden data as [1, F, 3, H, W] in [-1, 1]."""
    return data[f"frames_{i}"].float()[None] / 127.5 - 1


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.double()).abs().max() / wanted.double().abs().max())


def small(name: str, **others) -> dict:
    """Arguments of a twin that sees pictures of at most 56×56."""
    return qwen2_vl_arguments(name, max_pixels=3136, **others)


def noise(dtype=torch.float32, frames: int = 4, size: tuple[int, int] = (40, 60)) -> Tensor:
    """[2, F, 3, H, W] of little contrast, so that no resize overshoots."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, frames, 3, *size, generator=generator, dtype=dtype) - 0.5


@pytest.fixture
def copied(tmp_path) -> dict:
    """Arguments of a copy of `videoalign`'s twin that a test may change."""
    shutil.copytree(QWEN2_VL, tmp_path / "twin")
    folder = tmp_path / "twin" / "videoalign"
    template = str(folder / "template.txt")
    return {
        "model": str(folder),
        "base": str(tmp_path / "twin" / "base"),
        "template": template,
        "min_pixels": 3136,
    }


# --- against the authors' code


def test_videoalign_scores_and_gradients_are_the_authors():
    data, prompts = golden("videoalign")
    reward = build_reward("videoalign", qwen2_vl_arguments("videoalign"))
    for i, prompt in enumerate(prompts):
        frames = clip(data, i).requires_grad_()
        output = reward(frames, [prompt])
        assert relative(output.score, data["overall"][i]) < 1e-5
        for j, name in enumerate(("VQ", "MQ", "TA")):
            assert relative(output.parts[name], data["scores"][i, j]) < 1e-5
        (gradient,) = torch.autograd.grad(output.score.sum(), frames)
        assert relative(gradient[0] * 2, data[f"grad_{i}"]) < 1e-4
    both = reward(torch.cat([clip(data, 0), clip(data, 1)]), prompts)
    assert relative(both.score, data["overall"]) < 1e-5 and torch.equal(both.loss, -both.score)
    assert torch.equal(both.parts["videoalign"], both.score)


def test_texts_are_tokenised_as_the_authors_processor_does():
    for name, merged in (("videoalign", 24), ("hpsv3", 256)):
        data, prompts = golden(name)
        reward = build_reward(name, qwen2_vl_arguments(name))
        ids = data["input_ids"]  # of two pictures of unequal size in `hpsv3`, so of its second alone
        if name == "hpsv3":
            wanted = ids[1][data["input_ids"][1] != reward.reader.tokenizer.pad_token_id]
            assert torch.equal(reward.reader.tokens(prompts[1:], merged)[0], wanted)
        else:
            assert torch.equal(reward.reader.tokens(prompts, merged), ids)


def test_hpsv3_scores_and_gradients_are_the_authors():
    data, prompts = golden("hpsv3")
    arguments = qwen2_vl_arguments("hpsv3")
    del arguments["min_pixels"]  # 448×448 by default
    reward = build_reward("hpsv3", arguments)
    frames = (data["resized_1"].float()[None, None] / 127.5 - 1).requires_grad_()
    output = reward(frames, prompts[1:])
    assert relative(output.score, data["score"][1]) < 1e-5
    (gradient,) = torch.autograd.grad(output.score.sum(), frames)
    wanted = data["grad_resized_1"].float() * data["grad_max_1"]  # kept in float16
    assert relative(gradient[0, 0] * 2, wanted) < 1e-3
    with torch.no_grad():
        for i, prompt in enumerate(prompts):  # the authors round the enlarged picture to 8 bits
            raw = reward(data[f"image_{i}"].float()[None, None] / 127.5 - 1, [prompt])
            assert relative(raw.score, data["score"][i]) < 2e-2


@pytest.mark.parametrize(
    ("given", "bounds", "wanted"),
    [
        # By hand from the rule in qwen-vl-utils: round(side / 28); then floor(side / β) or ceil(side · β).
        ((224, 224), (3136, 200_704), (224, 224)),
        ((240, 426), (3136, 200_704), (252, 420)),
        ((98, 70), (3136, 200_704), (112, 56)),  # 3.5 and 2.5: halves go to the even
        ((126, 14), (784, 200_704), (112, 28)),  # 4.5 → 4; 0.5 → 0, raised to one token
        ((480, 720), (3136, 200_704), (364, 532)),  # β = 1.3122: 365.8 and 548.7
        ((1080, 1920), (100_352, 200_704), (336, 588)),  # β = 45 / 14: 336 and 597.3
        ((96, 128), (200_704, 200_704), (392, 532)),  # β = 4.0415: 388.0 and 517.3, both up
        ((64, 64), (200_704, 200_704), (448, 448)),
        ((20, 30), (3136, 200_704), (56, 84)),  # β = 2.2862: 45.7 and 68.6
        ((28, 5600), (784, 20_000), (28, 1988)),  # β = 2.8: 10.0, raised to one token, and 2000.0
    ],
)
def test_smart_resize_against_a_table(given, bounds, wanted):
    assert smart_resize(*given, *bounds) == wanted


def test_a_strip_is_refused():
    with pytest.raises(ValueError, match="up to 200 times as long as wide, got 10x2010"):
        smart_resize(10, 2010, 784, 3136)


def test_patches_hold_the_pixels_of_their_place():
    """Each patch against a loop over frames, tokens and the patches in them."""
    clips = torch.rand(2, 3, 3, 56, 84)  # three frames: the last is repeated
    patches, grid = Patches(min_pixels=784, max_pixels=10**6, mean=(0, 0, 0), std=(1, 1, 1))(clips)
    assert grid == (2, 4, 6) and patches.shape == (2, 2, 24, 1176)
    position = 0
    for row, column in ((r, c) for r in range(2) for c in range(3)):
        for y, x in ((2 * row + i, 2 * column + j) for i in range(2) for j in range(2)):
            for time, frames in enumerate(([0, 1], [2, 2])):
                place = clips[:, frames, :, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14]
                wanted = place.transpose(1, 2).flatten(1)  # channel, frame, row, column
                torch.testing.assert_close(patches[:, time, position], wanted, rtol=0, atol=0)
            position += 1


# --- the files


def whole_state(arguments: dict) -> dict[str, Tensor]:
    """The twin's weights as PEFT names those of a whole model, its adapter unmerged."""
    checkpoint = Path(arguments["model"]) / "checkpoint-10"
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    adapted = {key.rpartition(".lora_")[0].removeprefix("base_model.model.") for key in adapter}
    state = {}
    for key, value in load_file(Path(arguments["base"]) / "model.safetensors").items():
        layer, _, kind = key.rpartition(".")
        state[f"base_model.model.{layer}{'.base_layer' if layer in adapted else ''}.{kind}"] = value
    state |= {key.replace(".weight", ".default.weight"): value for key, value in adapter.items()}
    return state | torch.load(checkpoint / "non_lora_state_dict.pth", weights_only=True)


def score(arguments: dict) -> Tensor:
    data, prompts = golden("videoalign")
    with torch.no_grad():
        return build_reward("videoalign", arguments)(clip(data, 0), prompts[:1]).score


def test_a_whole_model_of_the_newest_checkpoint_scores_the_same_without_base_weights(copied):
    state = whole_state(copied)
    newest = Path(copied["model"]) / "checkpoint-120"
    newest.mkdir()
    torch.save(state, newest / "model.pth")
    (Path(copied["base"]) / "model.safetensors").unlink()
    (Path(copied["model"]) / "checkpoint-10" / "adapter_model.safetensors").write_bytes(b"older, not read")
    assert relative(score(copied), golden("videoalign")[0]["overall"][:1]) < 1e-5


def test_tied_embeddings_may_be_kept_under_either_name(tmp_path):
    state = load_file(QWEN2_VL / "hpsv3" / "HPSv3.safetensors")
    base = shutil.copytree(QWEN2_VL / "base", tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    scores = []
    for dropped, kept in (("lm_head.weight", None), ("model.embed_tokens.weight", "lm_head.weight")):
        own = {key: value for key, value in state.items() if key != dropped}
        if kept:
            own[kept] = state[dropped]
        save_file(own, tmp_path / "HPSv3.safetensors")
        arguments = small("hpsv3") | {"model": str(tmp_path), "base": str(base)}
        scores.append(build_reward("hpsv3", arguments)(noise(), PROMPTS).score)
    scores.append(build_reward("hpsv3", small("hpsv3"))(noise(), PROMPTS).score)
    torch.testing.assert_close(scores, [scores[0]] * 3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_of_the_adapter_is_the_settings(copied, rslora):
    """alpha / r, or alpha / √r: merged by hand, the weights score the same."""
    path = Path(copied["model"]) / "model_config.json"
    settings = json.loads(path.read_text())
    settings["peft_lora_config"] |= {"lora_alpha": 12, "use_rslora": rslora}
    path.write_text(json.dumps(settings))
    adapted = score(copied)
    state = {key.replace(".base_layer", ""): value for key, value in whole_state(copied).items()}
    for key in [key for key in state if ".lora_A." in key]:
        a, b = state.pop(key), state.pop(key.replace("lora_A", "lora_B"))
        state[key.replace(".lora_A.default", "")] += 12 / (2 if rslora else 4) * b @ a
    torch.save(state, Path(copied["model"]) / "checkpoint-10" / "model.pth")
    torch.testing.assert_close(score(copied), adapted, rtol=1e-5, atol=1e-5)
    assert relative(adapted, golden("videoalign")[0]["overall"][:1]) > 1e-3


def test_mean_deviation_and_size_come_from_the_settings(copied):
    data, prompts = golden("videoalign")
    path = Path(copied["model"]) / "model_config.json"
    settings = json.loads(path.read_text())
    settings["inference_config"] = {f"{name}_mean": 0.0 for name in ("VQ", "MQ", "TA")}
    settings["inference_config"] |= {"VQ_std": 1.0, "MQ_std": 2.0, "TA_std": 4.0}
    settings["data_config"]["max_frame_pixels"] = 3136
    path.write_text(json.dumps(settings))
    reward = build_reward("videoalign", copied | {"max_pixels": 200_704})
    parts = reward(clip(data, 0), prompts[:1]).parts
    mean, deviation = torch.tensor([3.6, 1.1, 2.8]), torch.tensor([2.2, 1.3, 2.5])
    wanted = (data["scores"][0] * deviation + mean) / torch.tensor([1.0, 2.0, 4.0])
    assert relative(torch.cat([parts[name] for name in ("VQ", "MQ", "TA")]), wanted) < 1e-5
    assert build_reward("videoalign", copied).reader.patches.max_pixels == 3136


def test_base_weights_are_listed_only_where_they_are_needed(copied):
    kinds = [weight.kind for weight in required_weights("videoalign", copied)]
    assert kinds == ["checkpoint", "model", "file"]
    (Path(copied["model"]) / "checkpoint-10" / "model.pth").write_bytes(b"")
    kinds = [weight.kind for weight in required_weights("videoalign", copied)]
    assert kinds == ["checkpoint", "tokenizer", "file"]
    published = required_weights("videoalign")
    assert [weight.source for weight in published][:2] == ["KwaiVGI/VideoReward", "Qwen/Qwen2-VL-2B-Instruct"]
    assert published[2].sha256 == videoalign_module.PROMPT.sha256


# --- the prompt's text


def test_the_prompt_is_read_from_the_authors_file_and_the_file_is_not_run(tmp_path):
    source = "raise SystemExit\nA = '''Rate {text_prompt}'''\nB = ' <|R|>'\nC = print()\n"
    published = PromptFile(
        constants=("A", "B"), sha256=hashlib.sha256(source.encode()).hexdigest(), member="p/t.py"
    )
    (tmp_path / "t.py").write_text(source)
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("p/t.py", source)
    for name in ("t.py", "w.whl"):
        assert read_template(tmp_path / name, published, ["<|R|>"]) == "Rate {text_prompt} <|R|>"
    (tmp_path / "t.py").write_text(source + "\n")
    with pytest.raises(
        ValueError, match=r"t.py' is not the published file: its SHA-256 is [0-9a-f]{64}, not"
    ):
        read_template(tmp_path / "t.py", published, [])
    (tmp_path / "w.whl").write_bytes(b"not a wheel")
    with pytest.raises(ValueError, match="w.whl' cannot be read .* fetch it again"):
        read_template(tmp_path / "w.whl", published, [])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Rate it <|R|>", r"must hold \{text_prompt\} once and no other braces, got none"),
        ("{text_prompt} {other} <|R|>", r"got \{text_prompt\}, \{other\}"),
        ("{text_prompt} } <|R|>", "once and no other braces"),
        ("{text_prompt}", r"must hold <\|R\|> once"),
    ],
)
def test_a_template_that_lacks_something_is_refused(tmp_path, text, sentence):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_template(tmp_path / "t.txt", PromptFile(constants=(), sha256=""), ["<|R|>"])


def test_published_addresses_are_pinned():
    for module in (videoalign_module, hpsv3_module):
        weight = module.PROMPT_WEIGHT
        assert weight.source.startswith("https://") and weight.source.endswith(weight.file)
        assert len(weight.sha256) == len(module.PROMPT.sha256) == 64


# --- the scorers' promises, beyond tests/test_reward_contract.py


@pytest.mark.parametrize("name", NAMES)
def test_gradients_match_central_differences(name):
    reward = build_reward(name, small(name), dtype=torch.float64)
    frames = noise(torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(frames, PROMPTS).loss.sum(), frames)
    generator = torch.Generator().manual_seed(1)
    for direction in (gradient, torch.randn(frames.shape, generator=generator, dtype=torch.float64)):
        step = 1e-6 * direction / direction.abs().max()
        with torch.no_grad():
            ahead, behind = (reward(frames + sign * step, PROMPTS).loss.sum() for sign in (1, -1))
        expected, measured = (gradient * step).sum(), (ahead - behind) / 2
        assert abs(expected - measured) <= 1e-5 * abs(measured)


@pytest.mark.parametrize("name", NAMES)
def test_order_and_company_of_a_clip_do_not_matter(name):
    """Prompts of unequal length in one forward pass: the shorter is padded, and scores as it does alone."""
    reward = build_reward(name, small(name, slice_size=16))
    frames = noise()
    together = reward(frames, PROMPTS).score
    swapped = reward(frames.flip(0), PROMPTS[::-1]).score
    torch.testing.assert_close(swapped.flip(0), together, rtol=1e-5, atol=1e-5)
    for i, prompt in enumerate(PROMPTS):
        alone = reward(frames[i : i + 1], [prompt]).score
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-5, atol=1e-5)
    assert (reward(frames, PROMPTS[::-1]).score - together).abs().min() > 1e-3  # the prompt matters


def test_an_odd_number_of_frames_is_filled_up_with_the_last():
    reward = build_reward("videoalign", small("videoalign"))
    frames = noise(frames=5)
    filled = torch.cat([frames, frames[:, -1:]], dim=1)
    assert torch.equal(reward(frames, PROMPTS).score, reward(filled, PROMPTS).score)
    with torch.no_grad():
        backwards = reward(frames.flip(1), PROMPTS).score
    assert (backwards - reward(frames, PROMPTS).score).abs().min() > 1e-4  # the order of frames matters


def test_each_dimension_has_its_weight():
    frames = noise()
    parts = build_reward("videoalign", small("videoalign"))(frames, PROMPTS).parts
    output = build_reward("videoalign", small("videoalign", vq=0.0, mq=2.0, ta=-1.0))(frames, PROMPTS)
    torch.testing.assert_close(output.score, 2 * parts["MQ"] - parts["TA"])
    assert all(torch.equal(output.parts[name], parts[name]) for name in ("VQ", "MQ", "TA"))


@pytest.mark.parametrize("name", NAMES)
def test_each_layer_is_recomputed_and_no_gradient_reaches_the_weights(name):
    reward = build_reward(name, small(name, slice_size=16))
    calls = []
    network = reward.reader.network
    for block in (network.visual.blocks[0].mlp, network.language_model.layers[0].mlp):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    frames = noise().requires_grad_()
    loss = reward(frames, PROMPTS).loss.sum()
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == 4 and frames.grad.isfinite().all()
    assert not list(reward.parameters())
    assert not any(b.requires_grad or b.grad is not None for b in reward.buffers())


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_keeps_the_head_and_the_positions_exact(name):
    exact, half = (build_reward(name, small(name), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert all(b.dtype == torch.float32 for b in half.head.buffers())
    assert not any("inv_freq" in key for key, _ in half.named_buffers())
    with torch.no_grad():
        wanted, found = (reward(noise(), PROMPTS).score for reward in (exact, half))
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.1)


def test_four_bits_score_about_the_same_and_pass_gradients():
    frames = noise().requires_grad_()
    exact = build_reward("hpsv3", small("hpsv3"))(frames, PROMPTS).score
    reward = build_reward("hpsv3", small("hpsv3", nf4=True), dtype=torch.bfloat16)
    stored = reward.reader.network.language_model.layers[0].mlp.up_proj
    assert stored.weight.dtype == torch.uint8 and stored.scale.dtype == stored.code.dtype == torch.float32
    assert stored.dtype == torch.bfloat16 and not list(reward.parameters())
    score = reward(frames, PROMPTS).score
    (gradient,) = torch.autograd.grad(score.sum(), frames)
    assert gradient.isfinite().all() and gradient.any() and (score - exact).abs().max() < 1


# --- frames of finished videos


@pytest.mark.parametrize(
    ("count", "fps", "wanted"),
    [
        (48, 24.0, 4),  # 2 seconds
        (17, 24.0, 4),  # 1.4 frames, at least 4
        (120, 24.0, 10),
        (108, 24.0, 8),  # 9 frames: 4.5 pairs, a half goes to the even
        (132, 24.0, 12),  # 11 frames: 5.5 pairs
        (5, 1.0, 4),  # 10 frames, but only 2 pairs are there
        (6, 1.0, 6),
        (40, None, 8),
        (3, 24.0, 3),  # too few, as the score then says
    ],
)
def test_two_frames_of_a_second_are_sampled(count, fps, wanted):
    reward = build_reward("videoalign", small("videoalign"))
    index = reward.sample_frames(count, fps)
    assert torch.equal(index, torch.linspace(0, count - 1, wanted).round().long())
    mixture = Mixture({"v": reward, "m": build_reward("motion")}, {"v": 1.0, "m": 1.0})
    assert len(mixture.sample_frames(count, fps)) == max(wanted, min(8, count))


def test_finished_videos_are_sampled_by_their_own_rate(tmp_path):
    path = save_video(torch.rand(3, 20, 16, 16) * 2 - 1, tmp_path / "clip", fps=4)
    assert frame_rate(path) == 4 and frame_rate(tmp_path / "still.png") is None
    reward = build_reward("videoalign", small("videoalign"))
    video = torch.rand(1, 3, 20, 28, 28) - 0.5
    wanted = reward(video[:, :, torch.linspace(0, 19, 10).round().long()].transpose(1, 2), PROMPTS[:1])
    found = metrics.score_videos(reward, video, [Prompt(PROMPTS[0])], frame_rate(path))
    assert torch.equal(found.score, wanted.score)


# --- refusals


def refusal(arguments: dict, name: str = "videoalign") -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        build_reward(name, arguments)
    return str(caught.value)


def test_too_few_frames_are_refused():
    with pytest.raises(
        ValueError, match="'videoalign' needs at least 4 frames, got 3: decode more with decode_frame"
    ):
        build_reward("videoalign", small("videoalign"))(noise(frames=3), PROMPTS)


def test_prompts_with_the_rewards_own_tokens_are_refused():
    sentence = r"the prompt 'a <|VQ_reward|>' holds <|VQ_reward|>, a special token of the reward; remove it"
    arguments = small("videoalign")
    assert prompt_errors("videoalign", arguments, ["a <|VQ_reward|>", "a {brace}"]) == [sentence]
    assert len(prompt_errors("hpsv3", small("hpsv3"), ["<|image_pad|> and <|Reward|>"])) == 2
    with pytest.raises(ValueError, match="holds <.VQ_reward.>, a special token"):
        build_reward("videoalign", arguments)(noise(), ["a <|VQ_reward|>", "a"])


def test_wrong_folders_are_refused(copied):
    base = copied["base"]
    assert "it has no model_config.json with checkpoint-*/model.pth or model_config" in refusal(
        copied | {"model": base}
    )
    assert "is not a tokenizer folder" in refusal(small("hpsv3") | {"base": copied["model"]}, "hpsv3")
    assert "there is no" in refusal(copied | {"template": "no/such/template.txt"})
    (Path(base) / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    assert "a model of type 'qwen2_5_vl', not 'qwen2_vl'" in refusal(copied)
    (Path(base) / "config.json").write_text("{")
    assert "config.json is no JSON object or is damaged" in refusal(copied)


def test_other_settings_are_refused(copied):
    path = Path(copied["model"]) / "model_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"model_config": {"output_dim": 3, "use_special_tokens": True}}))
    assert "describes a reward with output_dim=3, reward_token=None; it can be output_dim=1" in refusal(
        copied
    )
    path.write_text(json.dumps(settings | {"peft_lora_config": {"lora_r": 8, "lora_alpha": 8}}))
    assert "holds a LoRA of rank 4, its settings say 8" in refusal(copied)
    path.write_text(json.dumps(settings))
    assert "max_pixels at least 784, the area of a token; got 3136 and 700" in refusal(
        copied | {"max_pixels": 700}
    )


def test_damaged_and_foreign_weights_are_refused(copied, tmp_path):
    checkpoint = Path(copied["model"]) / "checkpoint-10"
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    state = whole_state(copied)
    kept = {key: value for key, value in adapter.items() if "0.mlp.up_proj.lora_B" not in key}
    save_file(kept, checkpoint / "adapter_model.safetensors")
    assert "a LoRA of 'language_model.layers.0.mlp.up_proj' without its other half" in refusal(copied)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"damaged")
    assert "adapter_model.safetensors: it is damaged" in refusal(copied)
    torch.save(state | {"base_model.model.extra": torch.zeros(1)}, checkpoint / "model.pth")
    assert "do not fit the model its settings describe: 1 unexpected: extra" in refusal(copied)
    state["base_model.model.model.embed_tokens.weight"] = torch.zeros(263, 64)
    torch.save(state, checkpoint / "model.pth")
    assert "embeddings of 263 tokens, its tokenizer 266: the reward's special tokens" in refusal(copied)
    (checkpoint / "model.pth").write_bytes(b"damaged")
    assert "model.pth: it is damaged" in refusal(copied)
    weights = load_file(QWEN2_VL / "hpsv3" / "HPSv3.safetensors")
    del weights["rm_head.3.weight"]
    save_file(weights, tmp_path / "HPSv3.safetensors")
    arguments = small("hpsv3") | {"model": str(tmp_path / "HPSv3.safetensors")}
    assert "is not HPSv3: it has no rm_head.3.weight" in refusal(arguments, "hpsv3")


def test_wrong_arguments_are_named_before_anything_loads():
    assert "vq must be a number, got 'much'" in check_reward_config("videoalign", {"vq": "much"})[0]
    assert "nf4 must be" in check_reward_config("hpsv3", {"nf4": 4})[0]


# --- training


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_five_steps_train_towards_it(name, dtype, twin, tmp_path):
    overrides = {
        "reward_fn": name,
        "reward_args": small(name) | {"min_pixels": 784, "max_pixels": 784},
        "train_batch_size": 1,
        "decode_frame": "all" if name == "videoalign" else "fml",
        "dtype": dtype,
        "max_train_steps": 5,
    }
    assert twin_runs.start(twin, tmp_path / "run", **overrides) == 0
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    assert len(rows) == 6
    for row in rows[1:]:
        values = dict(zip(header, map(float, row.split(",")), strict=True))
        assert values["grad_norm"] > 0 and values["skipped"] == 0
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any(value.any() for key, value in weights.items() if "lora_B" in key)
