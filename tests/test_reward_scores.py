"""Scores against independent computations of each official pipeline, on 8-bit pictures and tiny twins.

The other side is transformers' own processors and models, open_clip's golden numbers, or numpy.
"""

from __future__ import annotations

import colorsys
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reward_twins import clip_folder, open_clip_state, siglip_folder, smooth_images, twin_arguments
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    GemmaTokenizer,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionModel,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessorPil,
    VJEPA2Model,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from Core.rewards import build_reward
from Core.rewards.heads import linear_layers
from Core.rewards.vjepa import hidden_tokens
from Core.utils.state_dict import load_state

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = ["a red fox", "two dogs, running."]
# Pixel sizes and the relative error allowed: images a model takes as they are, and two that it resizes.
SIZES = [pytest.param((16, 16), 1e-3, id="exact"), pytest.param((40, 72), 1e-2, id="wide")]
SIZES.append(pytest.param((72, 40), 1e-2, id="tall"))


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> dict[str, dict]:
    return twin_arguments(tmp_path_factory.mktemp("twins"))


def as_frames(images: Tensor) -> Tensor:
    """8-bit [N, 3, H, W] → one-frame videos [N, 1, 3, H, W] in [-1, 1]."""
    return images[:, None].float() / 127.5 - 1


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def to_tensor(given: list[Image.Image]) -> Tensor:
    """The pictures as 8-bit [N, 3, H, W]."""
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in given])


def unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


@torch.no_grad()
def clip_features(folder: str, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor, float]:
    """Unit features by transformers' processor, tokenizer and model."""
    model = CLIPModel.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures(images), return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder)(prompts, padding="max_length", return_tensors="pt")
    output = model(**pixels, **tokens)
    return output.image_embeds, output.text_embeds, model.logit_scale.exp().item()


def read_head(path: str) -> list[tuple[np.ndarray, np.ndarray]]:
    state = torch.load(path, weights_only=True)
    indices = sorted({int(key.split(".")[1]) for key in state})
    return [(state[f"layers.{i}.weight"].numpy(), state[f"layers.{i}.bias"].numpy()) for i in indices]


def close(measured: Tensor, expected: Tensor | np.ndarray, tolerance: float, spread: float) -> bool:
    """Whether errors stay below `tolerance` of the value, or of `spread` where a twin's scores cross zero."""
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float32)
    return bool(((measured - expected).abs() <= tolerance * expected.abs().clamp_min(spread)).all())


@pytest.mark.parametrize(("size", "tolerance"), SIZES)
def test_clip_scorers_follow_transformers(size, tolerance, arguments):
    images = smooth_images(2, size)
    image, text, scale = clip_features(arguments["pick_score"]["model"], images, PROMPTS)
    cosine = (unit(image) * unit(text)).sum(-1)
    for name, factor in (("pick_score", scale), ("clip_score", 100.0)):
        output = build_reward(name, arguments[name])(as_frames(images), PROMPTS)
        assert close(output.score, factor * cosine, tolerance, spread=factor * 0.4)
        torch.testing.assert_close(output.loss, (1 - output.score / 100).abs())


@pytest.mark.parametrize(("size", "tolerance"), SIZES)
def test_heads_follow_their_formula(size, tolerance, arguments):
    images = smooth_images(2, size)
    square = [picture.resize((16, 16), Image.Resampling.BILINEAR) for picture in pictures(images)]
    cropped, _, _ = clip_features(arguments["aesthetic"]["model"], images, PROMPTS)
    squashed, _, _ = clip_features(arguments["aesthetic"]["model"], to_tensor(square), PROMPTS)

    def linear(feature: np.ndarray) -> np.ndarray:
        for weight, bias in read_head(arguments["aesthetic"]["head"]):
            feature = feature @ weight.T + bias
        return feature

    jpeg = unit(squashed).numpy()
    *hidden, last = read_head(arguments["compression"]["head"])
    for weight, bias in hidden:
        jpeg = np.maximum(jpeg @ weight.T + bias, 0)
    jpeg = jpeg @ last[0].T + last[1]
    amount = 1 / (1 + np.exp(-linear(unit(squashed).numpy())))
    expected = {
        "aesthetic": linear(unit(cropped).numpy()),
        "rainy": amount,
        "snowy": amount,
        "weather": amount,
        "compression": jpeg,
        "incompressibility": jpeg,
    }
    for name, value in expected.items():
        output = build_reward(name, arguments[name])(as_frames(images), PROMPTS)
        assert close(output.score, value[:, 0], tolerance, spread=1.0), name


def test_each_scorer_crops_an_odd_margin_as_its_pipeline(arguments):
    """16 of 19 columns: torchvision's ``CenterCrop`` starts at round(1.5) = 2, transformers at 3 // 2 = 1."""
    images = smooth_images(2, (16, 19))
    starts = {"aesthetic": 2, "pick_score": 1, "clip_score": 1}
    for name, start in starts.items():
        reward = build_reward(name, arguments[name])
        for first in (1, 2):
            cut = reward(as_frames(images[..., first : first + 16]), PROMPTS).score
            same = torch.allclose(reward(as_frames(images), PROMPTS).score, cut)
            assert same == (first == start), name


def test_hps_pads_as_hpsv2(arguments):
    transform = build_reward("hps", arguments["hps"]).image.transform
    assert transform.fit == "pad" and transform.as_hpsv2 and transform.interpolation == "bicubic"


def test_losses_are_those_of_the_reference(arguments):
    frames = as_frames(smooth_images(2, (16, 16)))

    def run(name, **extra):
        output = build_reward(name, arguments[name] | extra)(frames, PROMPTS)
        return output.score, output.loss, output.parts

    same = torch.testing.assert_close
    score, loss, _ = run("aesthetic")
    same(loss, 0.1 * (score - 10).abs())
    score, loss, _ = run("hps")
    same(loss, 1 - score)
    score, loss, parts = run("aesthetic_hps")
    same(score, (parts["aesthetic"] + 15 * parts["hps"]) / 2)
    same(loss, (1.5 * 0.1 * (parts["aesthetic"] - 10).abs() + (1 - parts["hps"]).abs()) / 2)
    for name, sign in (("compression", 1), ("incompressibility", -1)):
        score, loss, _ = run(name)
        same(loss, sign * score)
        score, loss, _ = run(name, target=3.0)
        same(loss, (score - 3).abs())
    for name, extra in (("rainy", {}), ("snowy", {}), ("weather", {"kind": "snowy"})):
        score, loss, _ = run(name, **extra)
        same(loss, (score - 1).abs())
        score, loss, _ = run(name, target=0.25, **extra)
        same(loss, (score - 0.25).abs())
    score, loss, _ = run("object_detection")
    same(loss, -score.log())
    score, loss, _ = run("object_detection", goal="lower")
    same(loss, -(1 - score).log())
    score, loss, _ = run("sharpness", target=0.5)
    same(loss, (score - 0.5).abs())


@pytest.mark.parametrize(("name", "tolerance"), [("exact", 1e-3), ("wide", 1e-2), ("tall", 1e-2)])
def test_hps_follows_open_clip(name, tolerance, arguments):
    with safe_open(GOLDEN / "open_clip_tiny.safetensors", "pt") as file:
        golden = {key: file.get_tensor(key) for key in file.keys()}
        prompts = json.loads(file.metadata()["prompts"])
    checksum = torch.stack([value.double().abs().sum() for value in open_clip_state().values()])
    torch.testing.assert_close(
        checksum, golden["checksum"], msg="this torch draws other weights for the twin"
    )
    frames = as_frames(golden[f"{name}.images"])
    expected = (golden[f"{name}.longest"] * golden["text"]).sum(-1)
    score = build_reward("hps", arguments["hps"])(frames, prompts).score
    assert close(score, expected, tolerance, spread=0.25)


def test_hps_cleans_its_text_as_open_clip_does(arguments):
    """The tokenizer of open_clip 3.3.0 gives all four texts the same tokens."""
    reward = build_reward("hps", arguments["hps"])
    frames = as_frames(smooth_images(1, (16, 16)))
    plain = reward(frames, ["the fox's den, again"]).score
    for text in (
        "the fox\u2019s den, again",
        " The  FOX&amp;#39;s\n den,\tagain ",
        "the fox\u00e2\u20ac\u2122s den, again",
    ):
        torch.testing.assert_close(reward(frames, [text]).score, plain, rtol=0, atol=0)


def test_hps_squash_is_the_bilinear_stretch_of_the_reference(arguments):
    images = smooth_images(2, (40, 72))
    stretched = [picture.resize((16, 16), Image.Resampling.BILINEAR) for picture in pictures(images)]
    small = to_tensor(stretched)
    official = build_reward("hps", arguments["hps"])
    squash = build_reward("hps", arguments["hps"] | {"hps_resize": "squash"})
    score = squash(as_frames(images), PROMPTS).score
    assert close(score, official(as_frames(small), PROMPTS).score, 1e-2, spread=0.25)
    assert not close(score, official(as_frames(images), PROMPTS).score, 1e-1, spread=0.25)


@pytest.mark.parametrize(("size", "tolerance"), SIZES)
@torch.no_grad()
def test_clip_score_follows_siglip(size, tolerance, tmp_path):
    folder = siglip_folder(tmp_path / "siglip")
    images = smooth_images(2, size)
    model = SiglipModel.from_pretrained(folder)
    pixels = SiglipImageProcessorPil.from_pretrained(folder)(pictures(images), return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    output = model(input_ids=tokens.input_ids, **pixels)
    expected = 100 * (unit(output.image_embeds) * unit(output.text_embeds)).sum(-1)
    score = build_reward("clip_score", {"model": str(folder)})(as_frames(images), PROMPTS).score
    assert close(score, expected, tolerance, spread=25)


def multiply(state: dict, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def normed(state: dict, name: str, x: Tensor, epsilon: float) -> Tensor:
    return torch.nn.functional.layer_norm(
        x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], epsilon
    )


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)


def blip_image(state: dict, pixels: Tensor) -> Tensor:
    """Features of one picture [3, H, W] by BLIP's vision transformer, written out under the names of its file."""
    x = torch.nn.functional.conv2d(
        pixels[None], state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8
    )
    x = torch.cat([state["cls_token"][0], x[0].flatten(1).T]) + state["pos_embed"][0]
    for i in range(2):
        qkv = multiply(state, f"blocks.{i}.attn.qkv", normed(state, f"blocks.{i}.norm1", x, 1e-6))
        x = x + multiply(state, f"blocks.{i}.attn.proj", attend(*qkv.chunk(3, dim=-1), heads=1))
        inner = multiply(state, f"blocks.{i}.mlp.fc1", normed(state, f"blocks.{i}.norm2", x, 1e-6))
        x = x + multiply(state, f"blocks.{i}.mlp.fc2", torch.nn.functional.gelu(inner))
    return normed(state, "norm", x, 1e-6)


def blip_text(state: dict, ids: Tensor, seen: Tensor) -> Tensor:
    """First state of one text [L] by BLIP's text encoder, each of whose layers looks at ``seen``."""
    embedded = state["embeddings.word_embeddings.weight"][ids]
    x = embedded + state["embeddings.position_embeddings.weight"][: len(ids)]
    x = normed(state, "embeddings.LayerNorm", x, 1e-12)
    for i in range(2):
        for name, other in (("attention", None), ("crossattention", seen)):
            part = f"encoder.layer.{i}.{name}"
            q = multiply(state, f"{part}.self.query", x)
            k, v = (
                multiply(state, f"{part}.self.{n}", x if other is None else other) for n in ("key", "value")
            )
            out = multiply(state, f"{part}.output.dense", attend(q, k, v, heads=2))
            x = normed(state, f"{part}.output.LayerNorm", x + out, 1e-12)
        inner = torch.nn.functional.gelu(multiply(state, f"encoder.layer.{i}.intermediate.dense", x))
        out = multiply(state, f"encoder.layer.{i}.output.dense", inner)
        x = normed(state, f"encoder.layer.{i}.output.LayerNorm", x + out, 1e-12)
    return x[0]


@pytest.mark.parametrize(("size", "tolerance"), SIZES)
def test_image_reward_follows_its_formula(size, tolerance, arguments):
    folder = Path(arguments["image_reward"]["model"])
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    parts = {
        prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
    }
    vision, text, head = parts.values()
    images = smooth_images(2, size)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})(
        pictures(images), return_tensors="pt"
    ).pixel_values
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for image, prompt in zip(pixels, PROMPTS, strict=True):
        x = blip_text(text, torch.tensor(tokenizer(prompt).input_ids), blip_image(vision, image))
        for i in (0, 2, 4, 6, 7):
            x = multiply(head, f"layers.{i}", x)
        expected.append((x.item() - 0.16717362830052426) / 1.0333394966054072)
    score = build_reward("image_reward", arguments["image_reward"])(as_frames(images), PROMPTS).score
    assert close(score, np.array(expected), tolerance, spread=1.0)


@pytest.mark.parametrize(("size", "tolerance"), SIZES)
@torch.no_grad()
def test_aesthetic_v2_5_follows_its_formula(size, tolerance, arguments):
    given = arguments["aesthetic_v2_5"]
    images = smooth_images(2, size)
    pixels = SiglipImageProcessorPil.from_pretrained(given["model"])(pictures(images), return_tensors="pt")
    x = unit(SiglipVisionModel.from_pretrained(given["model"])(**pixels).pooler_output)
    state = torch.load(given["head"], weights_only=True)
    for i in (0, 2, 4, 6, 8):
        x = multiply(state, f"scoring_head.{i}", x)
    output = build_reward("aesthetic_v2_5", given)(as_frames(images), PROMPTS)
    assert close(output.score, x[:, 0], tolerance, spread=1.0)
    torch.testing.assert_close(output.loss, 0.1 * (output.score - 10).abs())


def test_a_cut_caption_is_named_once_with_how_much_is_lost(arguments, caplog):
    """CLIP's twin reads 24 tokens, two of them around the text; ImageReward's 35."""
    for name, room in (("clip_score", 22), ("image_reward", 33)):
        reward = build_reward(name, arguments[name])
        frames = torch.zeros(1, 1, 3, 16, 16)
        caplog.clear()
        kept = reward(frames, ["a" * room])
        assert not caplog.records, name
        cut = [reward(frames, ["a" * room + "b" * more]).score for more in (5, 9)]
        assert len(caplog.records) == 1 and "the last 5 are cut" in caplog.text
        assert f"reads {room + 2}" in caplog.text
        if name == "image_reward":
            assert torch.equal(cut[0], cut[1]) and torch.allclose(cut[0], kept.score)


def test_long_clip_reads_what_its_positions_hold(arguments, tmp_path, caplog):
    """Its folders keep plain CLIP's tokenizer, whose own limit is shorter."""
    folder = clip_folder(tmp_path / "long")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 10
    tokenizer.save_pretrained(folder)
    reward = build_reward("clip_score", {"model": str(folder)})
    frames = smooth_images(1, (16, 16))[:, None].float() / 127.5 - 1
    short, long = (reward(frames, ["a" * 12 + end]).score for end in ("b", "c"))
    assert short != long and not caplog.records


def test_siglip_2_reads_lower_case(tmp_path):
    folder = siglip_folder(tmp_path / "siglip")
    letters = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "▁", *"abcdefghij"])}
    GemmaTokenizer(vocab=letters, merges=[], model_max_length=12).save_pretrained(folder)
    reward = build_reward("clip_score", {"model": str(folder)})
    frames = torch.zeros(1, 1, 3, 16, 16)
    assert torch.equal(reward(frames, ["A Bad Egg"]).score, reward(frames, ["a bad egg"]).score)
    assert not torch.equal(reward(frames, ["a bad egg"]).score, reward(frames, ["a bad"]).score)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(("size", "tolerance"), SIZES)
@torch.no_grad()
def test_clip_score_follows_open_clip(size, tolerance, mode, tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="optional extra: pip install 'vader-t2v[open_clip]'")
    sizes = {"layers": 2, "mlp_ratio": 2.0, "width": 64}
    vision = sizes | {"head_width": 32, "patch_size": 8, "image_size": 16}
    text = sizes | {"heads": 1, "context_length": 24, "vocab_size": 49408}
    settings = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": mode}
    config = {
        "model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": settings,
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.model.CLIP(**config["model_cfg"])
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")

    name = f"local-dir:{tmp_path}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    images = smooth_images(2, size)
    image = model.encode_image(torch.stack([transform(picture) for picture in pictures(images)]))
    expected = 100 * (unit(image) * unit(model.encode_text(open_clip.get_tokenizer(name)(PROMPTS)))).sum(-1)
    score = build_reward("clip_score", {"model": f"open_clip:{name}"})(as_frames(images), PROMPTS).score
    assert close(score, expected, tolerance, spread=25)


@pytest.mark.parametrize(("size", "tolerance"), SIZES)
@torch.no_grad()
def test_actpred_follows_transformers(size, tolerance, arguments):
    folder = arguments["actpred"]["model"]
    clips = smooth_images(8, size).unflatten(0, (2, 4))
    model = VideoMAEForVideoClassification.from_pretrained(folder)
    processor = VideoMAEImageProcessorPil.from_pretrained(folder)
    pixels = processor([pictures(clip) for clip in clips], return_tensors="pt")
    logits = model(**pixels).logits
    label = torch.tensor([1, 0])  # as `videomae_folder` numbers them
    output = build_reward("actpred", arguments["actpred"])(
        clips.float() / 127.5 - 1, ["Playing guitar!", "a boy riding a red bike"]
    )
    expected = logits.softmax(-1).gather(1, label[:, None])[:, 0]
    assert close(output.score, expected, tolerance, spread=0.0)
    entropy = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    assert close(output.loss, entropy, tolerance, spread=0.1)


@pytest.mark.parametrize("size", [(32, 48), (48, 80), (80, 48), (50, 40), (40, 120)])
@torch.no_grad()
def test_object_detection_follows_transformers(size, arguments):
    folder = arguments["object_detection"]["model"]
    images = smooth_images(2, size)
    processor = YolosImageProcessorPil.from_pretrained(folder)
    pixels = processor(pictures(images), return_tensors="pt").pixel_values
    logits = YolosForObjectDetection.from_pretrained(folder)(pixel_values=pixels).logits
    expected = logits.softmax(-1)[..., 1].amax(-1)  # "dog"
    score = build_reward("object_detection", arguments["object_detection"])(as_frames(images), PROMPTS).score
    assert close(score, expected, 1e-3 if size == (32, 48) else 1e-2, spread=0.0)


@pytest.mark.parametrize(("size", "tolerance"), SIZES)
@torch.no_grad()
def test_vjepa_predicts_the_future_as_transformers_does(size, tolerance, arguments):
    """The past alone fills the context: then transformers' encoder on the cut clip is the masked encoder."""
    folder = arguments["vjepa"]["model"]
    clip = smooth_images(8, size)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 18},
        crop_size={"height": 16, "width": 16},
        resample=2,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    pixels = processor(pictures(clip), return_tensors="pt").pixel_values[None]
    model = VJEPA2Model.from_pretrained(folder)
    features = model.encoder(pixels).last_hidden_state
    past = model.encoder(pixels[:, :4]).last_hidden_state
    order = torch.arange(64)[None]
    predicted = model.predictor(torch.cat([past, 0 * past], 1), [order[:, :32]], [order[:, 32:]])
    target = (features - features.mean(-1, keepdim=True)) / features.std(-1, keepdim=True, unbiased=False)
    expected = (predicted.last_hidden_state - target[:, 32:]).abs().mean()

    reward = build_reward("vjepa", arguments["vjepa"])
    tokens = reward.tokens(clip[None].float() / 255)
    hidden = hidden_tokens(4, 4)["future"]
    ours = torch.nn.functional.layer_norm(reward.encode(tokens, order), (24,))
    measured = reward.error(tokens, ours, order, hidden)
    assert close(measured, expected[None], tolerance, spread=0.0)


@torch.no_grad()
def test_vjepa_context_sees_nothing_that_is_hidden(arguments):
    reward = build_reward("vjepa", arguments["vjepa"])
    tokens = reward.tokens(torch.rand(1, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    target, order = torch.zeros(1, 64, 24), torch.arange(64)[None]
    for hidden in hidden_tokens(4, 4).values():
        disturbed = tokens + 10 * hidden[:, None]
        same = [reward.error(t, target, order, hidden) for t in (tokens, disturbed)]
        torch.testing.assert_close(same[0], same[1], rtol=0, atol=0)


def test_relative_is_the_difference_between_two_prompts(arguments):
    frames = as_frames(smooth_images(2, (16, 16)))
    for name in ("pick_score", "clip_score"):
        inner = build_reward(name, arguments[name])
        wanted, unwanted = (
            inner(frames, [f"{words} {prompt}" for prompt in PROMPTS])
            for words in ("a photo of", "noise and")
        )
        args = {
            "reward": name,
            "reward_args": arguments[name],
            "positive": "a photo of ",
            "negative": "noise and",
        }
        output = build_reward("relative", args)(frames, PROMPTS)
        torch.testing.assert_close(output.score, wanted.score - unwanted.score)
        torch.testing.assert_close(output.loss, wanted.loss - unwanted.loss)
        torch.testing.assert_close(output.loss, -output.score / 100)
        assert list(output.parts) == [name, "relative"]
        torch.testing.assert_close(output.parts["relative"], output.score.detach())
        nested = build_reward("hinge", {"reward": "relative", "reward_args": args, "target": 400.0})
        torch.testing.assert_close(nested(frames, PROMPTS).loss, 400 - output.score)


def test_relative_of_a_reward_that_does_not_read_the_prompt_is_refused(arguments):
    args = {"reward": "aesthetic", "reward_args": arguments["aesthetic"], "positive": "a", "negative": "b"}
    with pytest.raises(
        ValueError, match="'aesthetic' does not tell 'a' from 'b'; choose a reward that reads"
    ):
        build_reward("relative", args)(as_frames(smooth_images(2, (16, 16))), PROMPTS)


def test_hinge_stops_at_its_target(arguments):
    frames = as_frames(smooth_images(2, (16, 16)))
    for name, sign in (("aesthetic", 1), ("compression", -1)):
        inner = build_reward(name, arguments[name])(frames, PROMPTS)
        between = inner.score.mean().item()
        args = {"reward": name, "reward_args": arguments[name], "target": between}
        pixels = frames.clone().requires_grad_()
        hinge = build_reward("hinge", args)
        assert hinge.higher_is_better == (sign > 0)
        output = hinge(pixels, PROMPTS)
        torch.testing.assert_close(output.score, inner.score)
        torch.testing.assert_close(output.loss, (sign * (between - inner.score)).clamp_min(0))
        gradient = torch.autograd.grad(output.loss.sum(), pixels)[0].abs().amax(dim=(1, 2, 3, 4))
        assert sorted((gradient > 0).tolist()) == [False, True] and list(output.parts) == [name]


def test_guards_follow_numpy():
    images = smooth_images(8, (20, 24)).unflatten(0, (2, 4))
    frames, pixels = images.float() / 127.5 - 1, images.numpy() / 255.0
    motion = np.abs(pixels[:, 1:] - pixels[:, :-1]).mean((1, 2, 3, 4))
    luma = np.tensordot(pixels, [0.299, 0.587, 0.114], axes=(2, 0))
    inner = luma[..., 1:-1, 1:-1]
    laplacian = (
        luma[..., 2:, 1:-1] + luma[..., :-2, 1:-1] + luma[..., 1:-1, 2:] + luma[..., 1:-1, :-2] - 4 * inner
    )
    saturation = [colorsys.rgb_to_hsv(*pixel)[1] for pixel in np.moveaxis(pixels, 2, -1).reshape(-1, 3)]
    expected = {
        "motion": motion,
        "sharpness": laplacian.std((-1, -2)).mean(1),
        "saturation": np.reshape(saturation, (2, -1)).mean(1),
    }
    for name, value in expected.items():
        assert close(build_reward(name)(frames, PROMPTS).score, value, 1e-3, spread=0.0), name


def test_every_image_is_paired_with_its_own_prompt(arguments):
    reward = build_reward("pick_score", arguments["pick_score"])
    frames = as_frames(smooth_images(2, (16, 16)))
    swapped = reward(frames, PROMPTS[::-1]).score
    mixed = reward(frames[[0, 1, 0, 1]], [PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[0]]).score
    torch.testing.assert_close(mixed[2:], swapped)
    assert not torch.allclose(mixed[:2], swapped)


def test_laion_head_gives_the_golden_scores_and_gradients(tmp_path, arguments):
    """Golden numbers of the published head, which fix the one affine map that a head in its layout is."""
    with safe_open(GOLDEN / "aesthetic_head.safetensors", "pt") as file:
        golden = {key: file.get_tensor(key) for key in file.keys()}
    direction, embedding = golden["grad_embedding"][0], golden["embedding"]
    state, widths = {}, (768, 1024, 128, 64, 16, 1)
    for i, width_in, width_out in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        state[f"layers.{i}.weight"] = torch.eye(width_out, width_in)
        state[f"layers.{i}.bias"] = torch.zeros(width_out)
    state["layers.0.weight"][0] = direction
    state["layers.7.bias"][0] = golden["score"][0] - direction @ embedding[0]
    torch.save(state, tmp_path / "head.pth")

    head = torch.nn.Sequential(*linear_layers(load_state(tmp_path / "head.pth"), "head.pth"))
    features = embedding.clone().requires_grad_()
    score = head(features).squeeze(-1)
    torch.testing.assert_close(score, golden["score"], rtol=1e-5, atol=0)
    gradient = torch.autograd.grad(score.sum(), features)[0]
    torch.testing.assert_close(gradient, golden["grad_embedding"], rtol=1e-4, atol=1e-6)
