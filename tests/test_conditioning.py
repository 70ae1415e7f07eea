"""Caption features: encoded once, kept on disk, and the encoder freed."""

import contextlib
import gc
import os
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
import twins
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from Core.backbones import Backbone, Prompt, TextEncoder
from Core.backbones.base import file_identity, pad_text
from Core.backbones.opensora import OpenSora
from Core.backbones.opensora_prompts import parse_prompts
from Core.build import fetch_weights, new_backbone
from Core.config import build_config
from Core.data import text_embeddings
from Core.data.text_embeddings import ENCODE_BATCH, all_cached, encode_prompts
from Core.utils.distributed import Distributed


class CountingEncoder(TextEncoder):
    def __init__(self, seen: list[str]):
        self.seen = seen

    def encode(self, captions):
        self.seen += captions
        return [
            {
                "letters": torch.full((len(caption), 2), float(len(caption))),
                "first": torch.tensor(ord(caption[0])),
            }
            for caption in captions
        ]


@pytest.fixture
def backbone() -> SimpleNamespace:
    """A stand-in whose encoder gives each caption as many tokens as letters; ``built`` holds the encoders."""
    family = SimpleNamespace(
        text_identity="letters",
        seen=[],
        built=[],
        caption=str,
        negative_caption=None,
        text_weights=(),
        loading=lambda *_: contextlib.nullcontext(),
    )

    def text_encoder() -> CountingEncoder:
        encoder = CountingEncoder(family.seen)
        family.built.append(weakref.ref(encoder))
        return encoder

    family.text_encoder = text_encoder
    return family


def encoded(backbone, texts, cache) -> dict[str, dict[str, Tensor]]:
    """Features of each text."""
    prompts = encode_prompts(backbone, [Prompt(text) for text in texts], cache)
    assert [prompt.prompt.text for prompt in prompts] == list(texts)
    return {prompt.prompt.text: prompt.features_of() for prompt in prompts}


def cached(backbone, texts, cache) -> bool:
    return all_cached(backbone, [Prompt(text) for text in texts], cache)


def test_each_caption_is_encoded_once(backbone, tmp_path):
    features = encoded(backbone, ["a", "bb", "a"], tmp_path)
    assert backbone.seen == ["a", "bb"]
    shapes = {text: tuple(own["letters"].shape) for text, own in features.items()}
    assert shapes == {"a": (1, 2), "bb": (2, 2)}


def test_the_encoder_is_freed_and_not_built_again(backbone, tmp_path):
    first = encoded(backbone, ["a", "bb"], tmp_path)
    gc.collect()
    assert [encoder() for encoder in backbone.built] == [None]
    again = encoded(backbone, ["bb", "a"], tmp_path)
    assert len(backbone.built) == 1
    for text in first:
        assert first[text].keys() == again[text].keys() == {"letters", "first"}
        assert all(torch.equal(first[text][name], again[text][name]) for name in first[text])


def test_only_what_the_cache_lacks_is_encoded(backbone, tmp_path):
    encoded(backbone, ["a"], tmp_path)
    encoded(backbone, ["a", "bb"], tmp_path)
    assert backbone.seen == ["a", "bb"]


def test_every_text_of_a_prompt_is_encoded_and_found_by_its_clip(backbone, tmp_path):
    (prompt, other) = encode_prompts(backbone, parse_prompts(["|0|a|2|bb", "bb"]), tmp_path)
    assert backbone.seen == ["a", "bb"]
    assert [len(prompt.features_of(clip)["letters"]) for clip in range(4)] == [1, 1, 2, 2]
    assert len(other.features_of(3)["letters"]) == 2


@pytest.mark.parametrize("content", [b"", b"not a safetensors file"], ids=["empty", "damaged"])
def test_a_damaged_file_is_written_anew(backbone, tmp_path, content):
    expected = encoded(backbone, ["a"], tmp_path)["a"]["letters"]
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(content)
    assert torch.equal(encoded(backbone, ["a"], tmp_path)["a"]["letters"], expected)
    assert torch.equal(load_file(file)["letters"], expected)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("damage", ["flipped", "another shape", "another name", "no hash", "hash of another"])
def test_what_is_not_what_was_written_is_encoded_again(backbone, tmp_path, caplog, damage):
    expected = encoded(backbone, ["a", "bb"], tmp_path)["a"]["letters"]
    file = text_embeddings._cache_file(tmp_path, "letters", "a")
    other = text_embeddings._cache_file(tmp_path, "letters", "bb")
    features = load_file(file)
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    if damage == "flipped":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "hash of another":
        save_file(load_file(other), file, metadata)
    else:
        changed = {"another shape": {"letters": expected[:, :1].clone()}, "another name": {"more": expected}}
        save_file({**features, **changed.get(damage, {})}, file, None if damage == "no hash" else metadata)
    assert not cached(backbone, ["a"], tmp_path)
    assert torch.equal(encoded(backbone, ["a"], tmp_path)["a"]["letters"], expected)
    assert backbone.seen == ["a", "bb", "a"] and cached(backbone, ["a"], tmp_path)
    assert (
        f"1 entries are damaged or of an earlier version, and are made again, such as {file}" in caplog.text
    )


def test_only_used_prompts_are_encoded_and_few_are_held(backbone, tmp_path, monkeypatch):
    prompts = [Prompt(chr(97 + number) * 4) for number in range(20)]
    monkeypatch.setattr(text_embeddings, "HELD_BYTES", 100)
    found = encode_prompts(backbone, prompts, tmp_path, used=prompts[5:15])
    assert backbone.seen == [prompt.text for prompt in prompts[5:15]]
    assert len(found) == 20 and len(found.store.held) == 2 and len(found[5:15]) == 10
    assert [chr(one.features_of()["first"]) for one in found[5:15]] == [p.text[0] for p in prompts[5:15]]
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="text_cache: .* was removed or damaged while it was in use"):
        found[14].features_of()


def test_a_cache_that_cannot_be_written_is_held_in_memory(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(text_embeddings, "HELD_BYTES", 0)
    (tmp_path / "file").write_text("")
    assert len(encoded(backbone, ["aaa"], tmp_path / "file")["aaa"]["letters"]) == 3


def test_a_killed_run_keeps_what_it_has_encoded(backbone, tmp_path, monkeypatch):
    """The second batch never comes; the next run encodes it and no more."""
    captions = [str(number) for number in range(ENCODE_BATCH + 3)]
    encode = CountingEncoder.encode

    def die_later(encoder, batch):
        if encoder.seen:
            raise KeyboardInterrupt
        return encode(encoder, batch)

    monkeypatch.setattr(CountingEncoder, "encode", die_later)
    with pytest.raises(KeyboardInterrupt):
        encoded(backbone, captions, tmp_path)
    monkeypatch.undo()
    assert encoded(backbone, captions, tmp_path).keys() == set(captions)
    assert backbone.seen == captions


def test_a_cache_that_cannot_be_written_costs_one_warning(backbone, tmp_path, caplog):
    taken = tmp_path / "file"
    taken.write_text("")
    features = encoded(backbone, ["a", "bb"] * ENCODE_BATCH + list("cdefghijk"), taken)
    assert len(features) == 11 > ENCODE_BATCH
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "text_cache: captions could not be kept in" in caplog.text


def test_another_encoder_has_files_of_its_own(backbone, tmp_path):
    encoded(backbone, ["a"], tmp_path)
    backbone.text_identity = "other letters"
    assert not cached(backbone, ["a"], tmp_path)
    encoded(backbone, ["a"], tmp_path)
    assert backbone.seen == ["a", "a"]


def changed(backbone: OpenSora, **values) -> Backbone:
    """The same family under a configuration with these keys."""
    return new_backbone(build_config(backbone.values | values), torch.device("cpu"))


@pytest.fixture
def opensora(twin, tmp_path) -> OpenSora:
    values = twins.settings(twin, tmp_path / "run")
    built = new_backbone(build_config(values), torch.device("cpu"))
    built.values = values
    return built


def test_features_are_those_of_the_encoder_without_its_padding(opensora, tmp_path):
    captions = [opensora.caption(prompt) for prompt in twins.PROMPTS]
    features = encoded(opensora, twins.PROMPTS, tmp_path)
    direct = opensora.text_encoder().t5.encode(captions)
    for i, prompt in enumerate(twins.PROMPTS):
        valid = direct["mask"][i] != 0
        own = features[prompt]["features"]
        assert len(own) == valid.sum() < twins.TEXT_LENGTH or valid.all()
        torch.testing.assert_close(own, direct["y"][i, 0, valid])


def test_features_and_mask_of_a_batch_are_rebuilt(opensora, tmp_path):
    captions = [opensora.caption(prompt) for prompt in twins.PROMPTS]
    features = encoded(opensora, twins.PROMPTS, tmp_path)
    y, mask = pad_text([features[prompt]["features"] for prompt in twins.PROMPTS], torch.device("cpu"))
    direct = opensora.text_encoder().t5.encode(captions)
    length = mask.shape[1]
    assert torch.equal(mask, direct["mask"][:, :length] != 0) and not direct["mask"][:, length:].any()
    torch.testing.assert_close(y[mask], direct["y"][:, 0, :length][mask])


def test_the_identity_follows_weights_length_and_number_type(opensora, twin):
    entry = opensora.values["text_encoder"]
    elsewhere = {**opensora.values["model"], "from_pretrained": "someone/with-10-tokens"}
    others = [
        dict(dtype="bf16"),
        dict(text_encoder={**entry, "model_max_length": 10}, model=elsewhere),
        dict(text_encoder={**entry, "from_pretrained": str(twin / "clip")}),
        dict(text_encoding="8bit"),
        dict(text_encoding="cpu"),
    ]
    identities = {changed(opensora, **values).text_identity for values in others}
    assert len(identities | {opensora.text_identity}) == 1 + len(others)
    assert changed(opensora, aes=None, base_quant="nf4").text_identity == opensora.text_identity


def test_the_identity_of_a_folder_is_its_content(tmp_path):
    folder, copy = tmp_path / "t5", tmp_path / "elsewhere" / "t5"
    (folder / ".cache").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(3_000_000))
    shutil.copytree(folder, copy)
    (copy / ".cache" / "note").write_text("downloaded today")
    os.utime(copy / "config.json", (0, 0))
    assert file_identity(str(copy)) == file_identity(str(folder)) != file_identity("owner/t5")
    (copy / "model.safetensors").write_bytes(bytes([1]) * 3_000_000)
    changed = file_identity(str(copy))
    (copy / "config.json").write_text("[]")
    assert len({changed, file_identity(str(copy)), file_identity(str(folder))}) == 3


def test_a_text_encoder_downloaded_without_its_tokenizer_is_taken_up_again(
    opensora, twin, tmp_path, monkeypatch
):
    partial = shutil.copytree(twin / "t5", tmp_path / "t5", ignore=shutil.ignore_patterns("tokenizer*"))
    asked = []

    def snapshot_download(source, allow_patterns=None, local_dir=None, local_files_only=False):
        asked.append(source)
        return str(partial if local_files_only else twin / "t5")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    entry = {**opensora.values["text_encoder"], "from_pretrained": "someone/t5"}
    assert changed(opensora, text_encoder=entry).fetch() == [] and asked == ["someone/t5"] * 2


def test_another_way_of_encoding_has_files_of_its_own(opensora, tmp_path):
    exact = encoded(opensora, ["a fox"], tmp_path)["a fox"]["features"]
    for way, error in (("8bit", 0.05), ("cpu", 1e-6)):
        other = changed(opensora, text_encoding=way)
        assert not cached(other, ["a fox"], tmp_path)
        features = encoded(other, ["a fox"], tmp_path)["a fox"]["features"]
        assert cached(other, ["a fox"], tmp_path)
        assert (features - exact).norm() <= error * exact.norm()


def test_the_encoder_is_needed_for_what_is_not_cached_or_damaged(opensora, tmp_path):
    cache = tmp_path / "cache"
    encoded(opensora, ["a fox", "a bird"], cache)
    assert cached(opensora, ["a fox", "a bird"], cache)
    assert not cached(opensora, ["a fox", "a bird", "a cloud"], cache)
    next(cache.rglob("*.safetensors")).write_bytes(b"cut off")
    assert sorted(cached(opensora, [text], cache) for text in ("a fox", "a bird")) == [False, True]


@pytest.mark.parametrize("prompt, needed", [("a red fox", False), ("a green fox", True)])
def test_the_encoder_is_fetched_only_for_captions_that_are_not_cached(
    twin, tmp_path, monkeypatch, prompt, needed
):
    asked = []
    monkeypatch.setattr(OpenSora, "fetch", lambda self, text_encoder: asked.append(text_encoder) or [])
    cache = tmp_path / "cache"
    config = build_config(twins.settings(twin, tmp_path / "run", prompt=[prompt], text_cache=str(cache)))
    backbone = new_backbone(config, torch.device("cpu"))
    encoded(backbone, ["a red fox"], cache)
    fetch_weights(config, backbone, Distributed(), config.prompt_list)
    assert asked == [needed]


def test_captions_carry_the_scores_told_to_the_model(opensora):
    assert opensora.caption("A red fox") == "a red fox aesthetic score: 6.5."
    told = changed(opensora, aes=None, flow=2.0, camera_motion="pan left")
    assert told.caption("A red fox") == "a red fox motion score: 2.0. camera motion: pan left."
