"""Blocks that are streamed from the CPU, with the CPU itself for a device, and what the machine must have for it."""

import dataclasses
import functools

import pipelines
import pytest
import torch
import twins
from pipelines_hunyuan import save_hunyuan
from pipelines_modelscope import save_modelscope
from sharded_calls import adapter_gradient

from Core.build import new_backbone
from Core.config import ConfigError, build_config
from Core.config.checks import machine_errors
from Core.data.text_embeddings import encode_prompts
from Core.modules.streaming import BlockStream

# Experts that take turns, two streams of tokens, connections that skip blocks.
PIPELINES = {
    "wan": (lambda folder: pipelines.save_wan(folder, "a14b"), 5),
    "hunyuan_video15": (save_hunyuan, 5),
    "modelscope": (save_modelscope, 2),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory, twin):
    """A function that gives the config of a family, saved once."""

    @functools.cache
    def config_of(family: str):
        folder = tmp_path_factory.mktemp(family)
        if family == "opensora":
            values = twins.settings(twin, folder / "run", num_frames=1, is_vader_training=False)
            values["scheduler"]["num_sampling_steps"] = 2
            return build_config(values)
        save, frames = PIPELINES[family]
        return pipelines.config_for(
            family, save(folder / "pipeline"), num_frames=frames, num_sampling_steps=2
        )

    return config_of


def loaded(config, **models):
    """The family with other settings of its networks, which the CPU is refused otherwise, and its encoded prompts."""
    backbone = new_backbone(config, torch.device("cpu"))
    backbone.models = dataclasses.replace(backbone.models, **models)
    encoded = encode_prompts(backbone, config.prompt_list[:2], config.models.text_cache)
    backbone.load()
    return backbone, encoded


@pytest.mark.parametrize("grad_checkpoint", [True, False, "parts"])
@pytest.mark.parametrize("family", ["opensora", *PIPELINES])
def test_streamed_blocks_give_the_same_gradient_and_at_most_two_are_there(
    configs, family, grad_checkpoint, monkeypatch
):
    wanted = adapter_gradient(*loaded(configs(family)), bool(grad_checkpoint))
    there, enter = [], BlockStream.enter

    def watched(stream, number):
        enter(stream, number)
        there.append(stream.resident())
        assert number in there[-1]

    monkeypatch.setattr(BlockStream, "enter", watched)
    backbone, encoded = loaded(configs(family), stream_blocks=True)
    blocks = backbone.blocks
    assert torch.equal(adapter_gradient(backbone, encoded, grad_checkpoint), wanted)
    assert max(map(len, there)) <= 2
    assert {number for numbers in there for number in numbers} == set(range(len(blocks)))
    # Nothing of a block stays but the adapter, and what also runs outside of it.
    outside = {id(p) for module in backbone._unstreamed for p in module.parameters()}
    held = [
        sum(
            p.untyped_storage().nbytes()
            for p in block.parameters()
            if not p.requires_grad and id(p) not in outside
        )
        for block in blocks
    ]
    assert sum(size > 0 for size in held) <= 2


@pytest.mark.parametrize("models", [{"dtype": "fp8"}, {"base_quant": "nf4"}], ids=["fp8", "nf4"])
def test_blocks_in_fewer_bits_are_streamed_too(configs, models):
    config = configs("opensora")
    wanted = adapter_gradient(*loaded(config, **models))
    assert torch.equal(adapter_gradient(*loaded(config, stream_blocks=True, **models)), wanted)


def test_a_block_is_there_before_it_is_entered_once_its_turn_is_known(configs, monkeypatch):
    late, enter = [], BlockStream.enter

    def watched(stream, number):
        late.append(number not in stream.resident())
        enter(stream, number)

    monkeypatch.setattr(BlockStream, "enter", watched)
    backbone, encoded = loaded(configs("opensora"), stream_blocks=True)
    adapter_gradient(backbone, encoded)
    late.clear()
    predict = backbone.predictor([backbone.features(e) for e in encoded])
    z = torch.zeros(2, *backbone.latent_shape())
    with torch.no_grad():
        for _ in range(3):
            predict(z, torch.full((2,), 500.0))
    count = len(backbone.blocks)
    assert any(late[:count]) and not any(late[-count:])


def test_what_does_not_go_together_is_refused(configs):
    values = dict(configs("opensora").flat())
    with pytest.raises(ConfigError) as error:
        build_config(
            {**values, "shard_frozen": True, "stream_blocks": True, "compile_blocks": True, "dtype": "fp8"}
        )
    sentences = str(error.value)
    for pair in (
        "shard_frozen=True and stream_blocks=True",
        "shard_frozen=True and compile_blocks=True",
        "shard_frozen=True and dtype='fp8'",
        "stream_blocks=True and compile_blocks=True",
    ):
        assert f"{pair} do not go together; set" in sentences
    sharded = build_config({**values, "shard_frozen": True})
    streamed = build_config({**values, "stream_blocks": True})
    assert not machine_errors(sharded, 2, "cpu") and not machine_errors(streamed, 1, "cuda")
    assert "there is one; start several" in machine_errors(sharded, 1, "cuda")[0]
    assert "this machine has none" in machine_errors(streamed, 1, "cpu")[0]
