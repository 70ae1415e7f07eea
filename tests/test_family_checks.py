"""What every family of diffusers refuses before it loads weights, and what it knows of them by then."""

import functools
import json
import shutil

import pytest
from families import FAMILIES, KEYS, MAKERS
from pipelines import config_for, loaded, save_wan, train, with_adapter

from Core.backbones import BACKBONES
from Core.backbones.diffusers_base import DiffusersBackbone
from Core.cli import main
from Core.config import ConfigError
from Core.modules import lora


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folder of a tiny pipeline by its name, made when it is first asked for."""
    return functools.cache(lambda name: MAKERS[name](tmp_path_factory.mktemp("pipeline") / "tiny"))


def of_family(name: str, **keys) -> dict:
    family = name.partition(" ")[0]
    decoding = {"decode_context": BACKBONES.resolve(family).decode_contexts[-1]}
    return {**KEYS.get(family, {}), **decoding, "is_vader_training": True, "reward_fn": "saturation", **keys}


def sentences(name: str, folder, **keys) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        config_for(name.partition(" ")[0], folder, **of_family(name, **keys))
    return refused.value.errors


def test_all_families_of_diffusers_are_here():
    assert set(FAMILIES) == {
        name for name in BACKBONES if issubclass(BACKBONES.resolve(name), DiffusersBackbone)
    }


@pytest.mark.parametrize("name", MAKERS)
def test_an_adapter_that_does_not_fit_is_refused_before_weights_load(folder_of, name, tmp_path, monkeypatch):
    """From the configuration alone: the weights may not even be here."""
    folder, family = folder_of(name), name.partition(" ")[0]
    backbone, _ = loaded(family, folder, **KEYS.get(family, {}))
    shapes = type(backbone).denoiser_shapes(backbone.settings)
    assert shapes == {key: value.shape for key, value in backbone.denoiser.named_parameters()}
    lora.save(with_adapter(backbone).denoiser, tmp_path / "fits")
    size = {"lora_rank": 2, "lora_alpha": 2}
    config_for(family, folder, **of_family(name, lora_ckpt_path=str(tmp_path / "fits"), **size))
    narrow = shutil.copytree(folder, tmp_path / "narrow")
    for part in type(backbone).denoiser_parts(narrow).values():
        settings = json.loads((narrow / part / "config.json").read_text())
        width = {"block_out_channels": [8, 8]} if family == "modelscope" else {"num_attention_heads": 4}
        (narrow / part / "config.json").write_text(json.dumps(settings | width))
    monkeypatch.setattr(type(backbone), "load", lambda self: pytest.fail("loaded"))
    errors = sentences(
        name, narrow, lora_ckpt_path=str(tmp_path / "fits"), base_adapters=[str(tmp_path / "fits")], **size
    )
    for key in ("lora_ckpt_path", "base_adapters[0]"):
        assert any(
            error.startswith(f"{key}: the adapter {str(tmp_path / 'fits')!r} does not fit the model: ")
            and "of another shape" in error
            for error in errors
        ), errors


def test_a_checkpoint_that_does_not_fit_the_model_any_more_is_refused_before_weights_load(
    tmp_path, capsys, monkeypatch
):
    folder, run = save_wan(tmp_path / "wan"), tmp_path / "run"
    train("wan", folder, run, max_train_steps=1)
    settings = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps(settings | {"ffn_dim": 48}))
    monkeypatch.setattr(BACKBONES.resolve("wan"), "load", lambda self: pytest.fail("loaded"))
    assert main([str(run.with_suffix(".py")), "--max-train-steps", "2"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "does not fit the model: 4 of another shape: blocks.0.ffn.net.0.proj (32, 24) instead of (48, 24)"
        in said
    )
    assert "set resume='never'" in said


def test_an_adapter_of_one_expert_says_so(folder_of, tmp_path):
    lora.save(with_adapter(loaded("wan", folder_of("wan"))[0]).denoiser, tmp_path / "one")
    (error,) = sentences("wan a14b", folder_of("wan a14b"), base_adapters=[str(tmp_path / "one")])
    assert error.endswith("; set its expert to 'high_noise' or 'low_noise'")
    entry = dict(path=str(tmp_path / "one"), expert="low_noise")
    config_for("wan", folder_of("wan a14b"), **of_family("wan", base_adapters=[entry]))


def test_the_second_expert_is_fetched_where_there_is_one(folder_of, tmp_path):
    weight = BACKBONES.resolve("wan").weights["model_path"]
    assert "transformer_2/diffusion_pytorch_model-*.safetensors" in weight.patterns[0]
    assert not weight.lacks(folder_of("wan"))
    copy = shutil.copytree(folder_of("wan a14b"), tmp_path / "copy")
    assert not weight.lacks(copy)
    (copy / "transformer_2" / "diffusion_pytorch_model.safetensors").unlink()
    assert weight.lacks(copy) == "its component 'transformer_2' has no complete .safetensors"


GRPO = {"objective": "grpo", "group_size": 2, "decode_context": "isolated"}
IDLE = [
    (
        "wan",
        {"decode_context": "whole", "decode_reach": 2},
        "decode_reach=2 has an effect with decode_context='causal'",
    ),
    ("ltx", {"decode_reach": 2}, "decode_reach=2 has no effect on backbone='ltx'; remove it"),
    (
        "wan",
        GRPO | {"decode_context": "causal"},
        "decode_context='causal' has no effect with decode_frame='video'",
    ),
    (
        "wan",
        GRPO | {"decode_reach": 2},
        "remove it, or set decode_context='causal' and decode_frame to the frames",
    ),
    ("wan", {"train_experts": "low_noise"}, "train_experts='low_noise' has an effect on Wan 2.2 A14B alone"),
    ("wan", {"guidance_scale_2": 3.0}, "guidance_scale_2=3.0 has an effect on Wan 2.2 A14B alone"),
    (
        "cogvideox",
        GRPO | {"noise_level": 1.5},
        "noise_level must be at most 1, got 1.5, for backbone='cogvideox'",
    ),
    (
        "modelscope",
        GRPO | {"noise_level": 1.01},
        "noise_level must be at most 1, got 1.01, for backbone='modelscope'",
    ),
]


@pytest.mark.parametrize(("name", "keys", "sentence"), IDLE, ids=lambda value: str(value)[:40])
def test_keys_without_effect_and_out_of_bounds_are_refused_before_weights_load(
    folder_of, name, keys, sentence
):
    (error,) = sentences(name, folder_of(name), **keys)
    assert sentence in error


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("wan a14b", {"train_experts": "low_noise", "guidance_scale_2": 3.0}),
        ("wan", {"decode_context": "causal", "decode_reach": 2}),
        ("wan", GRPO | {"decode_frame": "all", "decode_context": "causal", "decode_reach": 2}),
        ("wan", GRPO | {"noise_level": 1.5}),
        ("ltx", GRPO),
        ("modelscope", GRPO | {"noise_level": 1.0}),
        ("modelscope", {"decode_frame": "2fps"}),
    ],
    ids=str,
)
def test_the_same_keys_are_taken_where_they_have_an_effect(folder_of, name, keys):
    config_for(name.partition(" ")[0], folder_of(name), **of_family(name, **keys))


def test_all_faults_of_a_pipeline_are_said_at_once(folder_of):
    errors = sentences(
        "wan", folder_of("wan"), train_experts="low_noise", image_size=(40, 64), num_frames=8, decode_reach=2
    )
    assert len(errors) == 4, errors
