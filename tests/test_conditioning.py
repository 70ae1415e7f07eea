"""Caption features: encoded once, kept on disk, and the encoder freed."""

import gc
import os
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
import twins
from safetensors.torch import load_file

from Core.backbones import OpenSora, VideoSpec
from Core.backbones.base import TextEncoder, file_identity, pad_text
from Core.build import fetch_weights
from Core.config.schema import Config
from Core.data.prompts import read_prompts
from Core.data.text_embeddings import ENCODE_BATCH, embed_captions, uncached
from Core.utils.distributed import Runtime


class CountingEncoder(TextEncoder):
    def __init__(self, seen: list[str]):
        self.seen = seen

    def encode(self, captions):
        self.seen += captions
        return [torch.full((len(caption), 2), float(len(caption))) for caption in captions]


@pytest.fixture
def backbone() -> SimpleNamespace:
    """A stand-in whose encoder gives each caption as many tokens as letters; ``built`` holds the encoders."""
    family = SimpleNamespace(text_identity="letters", seen=[], built=[])

    def text_encoder() -> CountingEncoder:
        encoder = CountingEncoder(family.seen)
        family.built.append(weakref.ref(encoder))
        return encoder

    family.text_encoder = text_encoder
    return family


def test_each_caption_is_encoded_once(backbone, tmp_path):
    features = embed_captions(backbone, ["a", "bb", "a"], tmp_path)
    assert backbone.seen == ["a", "bb"]
    assert {caption: tuple(f.shape) for caption, f in features.items()} == {"a": (1, 2), "bb": (2, 2)}


def test_the_encoder_is_freed_and_not_built_again(backbone, tmp_path):
    first = embed_captions(backbone, ["a", "bb"], tmp_path)
    gc.collect()
    assert [encoder() for encoder in backbone.built] == [None]
    again = embed_captions(backbone, ["bb", "a"], tmp_path)
    assert len(backbone.built) == 1
    assert all(torch.equal(first[caption], again[caption]) for caption in first)


def test_only_what_the_cache_lacks_is_encoded(backbone, tmp_path):
    embed_captions(backbone, ["a"], tmp_path)
    embed_captions(backbone, ["a", "bb"], tmp_path)
    assert backbone.seen == ["a", "bb"]


@pytest.mark.parametrize("content", [b"", b"not a safetensors file"], ids=["empty", "damaged"])
def test_a_damaged_file_is_written_anew(backbone, tmp_path, content):
    expected = embed_captions(backbone, ["a"], tmp_path)["a"]
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(content)
    assert torch.equal(embed_captions(backbone, ["a"], tmp_path)["a"], expected)
    assert torch.equal(load_file(file)["features"], expected)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


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
        embed_captions(backbone, captions, tmp_path)
    monkeypatch.undo()
    assert embed_captions(backbone, captions, tmp_path).keys() == set(captions)
    assert backbone.seen == captions


def test_a_cache_that_cannot_be_written_costs_one_warning(backbone, tmp_path, caplog):
    taken = tmp_path / "file"
    taken.write_text("")
    features = embed_captions(backbone, ["a", "bb"] * ENCODE_BATCH + list("cdefghijk"), taken)
    assert len(features) == 11 > ENCODE_BATCH
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "text_cache: captions could not be kept in" in caplog.text


def test_another_encoder_has_files_of_its_own(backbone, tmp_path):
    embed_captions(backbone, ["a"], tmp_path)
    backbone.text_identity = "other letters"
    embed_captions(backbone, ["a"], tmp_path)
    assert backbone.seen == ["a", "a"]


@pytest.fixture
def opensora(twin) -> OpenSora:
    settings = twins.settings(twin, twin)
    entries = {key: settings[key] for key in ("model", "vae", "text_encoder", "scheduler")}
    return OpenSora(
        **entries,
        video=VideoSpec(32, 32, 17, 24),
        multi_resolution="STDiT2",
        scores=dict(aes=6.5, flow=None, camera_motion=None),
        dtype="fp32",
        device=torch.device("cpu"),
    )


def test_features_are_those_of_the_encoder_without_its_padding(opensora, tmp_path):
    captions = [opensora.caption(prompt) for prompt in twins.PROMPTS]
    features = embed_captions(opensora, captions, tmp_path)
    direct = opensora.text_encoder().t5.encode(captions)
    for i, caption in enumerate(captions):
        valid = direct["mask"][i] != 0
        assert len(features[caption]) == valid.sum() < twins.TEXT_LENGTH or valid.all()
        torch.testing.assert_close(features[caption], direct["y"][i, 0, valid])


def test_features_and_mask_of_a_batch_are_rebuilt(opensora, tmp_path):
    captions = [opensora.caption(prompt) for prompt in twins.PROMPTS]
    features = embed_captions(opensora, captions, tmp_path)
    y, mask = pad_text([features[caption] for caption in captions], torch.device("cpu"))
    direct = opensora.text_encoder().t5.encode(captions)
    length = mask.shape[1]
    assert torch.equal(mask, direct["mask"][:, :length] != 0) and not direct["mask"][:, length:].any()
    torch.testing.assert_close(y[mask], direct["y"][:, 0, :length][mask])


def test_the_identity_follows_weights_length_and_number_type(opensora, twin):
    first = opensora.text_identity
    opensora.dtype = torch.bfloat16
    assert opensora.text_identity != first
    opensora.dtype = torch.float32
    entry = opensora.entries["text_encoder"]
    opensora.entries["text_encoder"] = {**entry, "model_max_length": 10}
    assert opensora.text_identity != first
    opensora.entries["text_encoder"] = {**entry, "from_pretrained": str(twin / "clip")}
    assert opensora.text_identity != first


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
    opensora.entries["text_encoder"] = {**opensora.entries["text_encoder"], "from_pretrained": "someone/t5"}
    assert opensora.fetch() == [] and asked == ["someone/t5"] * 2


def test_another_way_of_encoding_has_files_of_its_own(opensora, tmp_path):
    (exact,) = embed_captions(opensora, ["a fox"], tmp_path).values()
    for way, error in (("8bit", 0.05), ("cpu", 1e-6)):
        opensora.text_encoding = way
        assert uncached(opensora, ["a fox"], tmp_path) == ["a fox"]
        (features,) = embed_captions(opensora, ["a fox"], tmp_path).values()
        assert (features - exact).norm() <= error * exact.norm()


def test_the_encoder_is_needed_for_what_is_not_cached_or_damaged(opensora, tmp_path):
    embed_captions(opensora, ["a fox", "a bird"], tmp_path)
    assert uncached(opensora, ["a fox", "a bird", "a cloud"], tmp_path) == ["a cloud"]
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"cut off")
    assert len(uncached(opensora, ["a fox", "a bird"], tmp_path)) == 1


@pytest.mark.parametrize("prompt, needed", [("a red fox", False), ("a green fox", True)])
def test_the_encoder_is_fetched_only_for_captions_that_are_not_cached(
    twin, tmp_path, monkeypatch, prompt, needed
):
    asked = []
    monkeypatch.setattr(OpenSora, "fetch", lambda self, text_encoder: asked.append(text_encoder) or [])
    config = Config(
        **twins.settings(twin, tmp_path / "run", prompt=[prompt], text_cache=str(tmp_path / "cache"))
    )
    backbone = OpenSora.from_config(config, torch.device("cpu"))
    embed_captions(backbone, [backbone.caption("a red fox")], config.text_cache)
    fetch_weights(config, backbone, Runtime(), read_prompts(config))
    assert asked == [needed]


def test_captions_carry_the_scores_told_to_the_model(opensora):
    assert opensora.caption("A red fox") == "a red fox aesthetic score: 6.5."
    opensora.scores = dict(aes=None, flow=2.0, camera_motion="pan left")
    assert opensora.caption("A red fox") == "a red fox motion score: 2.0. camera motion: pan left."
