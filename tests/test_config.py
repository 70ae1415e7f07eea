"""The configuration: files, overrides and flags in, one checked object out."""

import re
import runpy
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import twins
from torch import nn

from Core.backbones import Backbone, OpenSora, opensora
from Core.config.schema import NESTED_FLAGS, Config, build_config, load_config
from Core.modules import lora
from Core.utils.options import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "Open-Sora" / "configs" / "opensora-v1-2" / "vader"
INHERITED = """resolution aspect_ratio num_frames fps save_fps frame_interval image_size multi_resolution
condition_frame_length align aes flow camera_motion model vae text_encoder scheduler prompt prompt_path start_index
end_index reference_path mask_strategy loop verbose"""
VADER = """is_vader_training train_batch_size val_batch_size num_val_runs seed lora_ckpt_path project_dir lr reward_fn
gradient_accumulation_steps lora_rank dtype mixed_precision logger_type use_wandb wandb_entity validation_steps
checkpointing_steps debug use_AdamW8bit hps_version num_train_epochs max_train_steps max_grad_norm backprop_mode
decode_frame is_sample_preview grad_checkpoint"""
PUBLISHED_DEFAULTS = dict(
    fps=24,
    multi_resolution="STDiT2",
    condition_frame_length=5,
    align=5,
    aes=6.5,
    train_batch_size=1,
    val_batch_size=1,
    num_val_runs=2,
    seed=200,
    lr=2e-4,
    gradient_accumulation_steps=8,
    lora_rank=16,
    lora_alpha=8,
    validation_steps=10,
    num_train_epochs=200,
    max_train_steps=800,
    max_grad_norm=1,
)


@pytest.fixture
def values(twin, tmp_path) -> dict:
    return twins.settings(twin, tmp_path / "run")


@pytest.fixture
def file(values, tmp_path) -> str:
    return str(twins.config_file(tmp_path / "config.py", values))


def errors_of(values: dict, **flags) -> list[str]:
    with pytest.raises(ConfigError) as error:
        build_config(values, flags)
    return error.value.errors


def test_every_published_key_exists_with_its_default():
    known = {field.name for field in fields(Config)}
    assert set((INHERITED + " " + VADER).split()) <= known
    defaults = {field.name: field.default for field in fields(Config)}
    assert {key: defaults[key] for key in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS


def test_every_key_is_read_by_the_program():
    """A key that nothing reads would be ignored in silence."""
    sources = [path for folder in ("Core", "scripts") for path in (ROOT / folder).rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    text += (ROOT / "Core" / "config.py").read_text(encoding="utf-8").split("def __post_init__")[1]
    unread = [
        f.name for f in fields(Config) if not re.search(rf"(config|self)\.{f.name}\b|\"{f.name}\"", text)
    ]
    assert unread == []


def test_clips_are_not_looped_where_a_family_cannot_continue_them(values, monkeypatch):
    monkeypatch.setattr(OpenSora, "continue_clip", Backbone.continue_clip)
    loops = {**values, "is_vader_training": False, "loop": 2, "condition_frame_length": 1}
    assert errors_of(loops) == ["loop=2, but OpenSora cannot continue a clip; set loop=1"]


def test_a_configuration_cannot_be_changed(values):
    with pytest.raises(FrozenInstanceError):
        build_config(values).lr = 1.0


def test_flags_win_over_overrides_and_those_over_the_file(file):
    config = load_config(
        [file, "--lr", "3e-4", "--cfg-options", "lr=1e-5", "seed=7", "scheduler.cfg_scale=1.5"]
    )
    assert (config.lr, config.seed, config.scheduler["cfg_scale"]) == (3e-4, 7, 1.5)
    assert config.scheduler["num_sampling_steps"] == 4


def test_flags_of_keys_inside_an_entry(file, twin):
    config = load_config(
        [file, "--cfg-scale", "2.5", "--num-sampling-steps", "3", "--ckpt-path", str(twin / "stdit")]
    )
    assert (config.scheduler["cfg_scale"], config.scheduler["num_sampling_steps"]) == (2.5, 3)
    assert config.model["from_pretrained"] == str(twin / "stdit")
    assert set(NESTED_FLAGS) == {"ckpt_path", "num_sampling_steps", "cfg_scale"}


def test_one_prompt_may_be_given_as_a_string(values):
    assert build_config({**values, "prompt": "a fox"}).prompt == ["a fox"]


def test_modules_that_a_config_file_imports_are_no_keys(file):
    text = Path(file).read_text()
    Path(file).write_text("import os\n" + text)
    assert load_config([file]).seed == 200


def test_saving_and_reading_again_changes_nothing(values, tmp_path):
    config = build_config(
        {**values, "reward_fn": {"pick_score": 1.0}, "reward_args": {"pick_score": values["reward_args"]}}
    )
    config.save(tmp_path / "resolved.py")
    assert load_config([str(tmp_path / "resolved.py")]) == config
    # It is plain Python, and states every key.
    keys = {key for key in runpy.run_path(str(tmp_path / "resolved.py")) if not key.startswith("__")}
    assert keys == {field.name for field in fields(Config)}


@pytest.mark.parametrize("name", ["vader_train.py", "vader_inference.py"])
def test_shipped_configs_load(name, tmp_path, monkeypatch):
    """From any folder; their weights are hub ids, which are looked up only when a run starts."""
    monkeypatch.chdir(tmp_path)
    options = ["--project-dir", str(tmp_path / "run"), "--text-cache", str(tmp_path / "cache")]
    config = load_config([str(SHIPPED / name), *options])
    assert config.is_vader_training == (name == "vader_train.py")
    assert (config.video.height, config.video.width, config.video.num_frames) == (276, 368, 51)
    assert (config.scheduler["num_sampling_steps"], config.scheduler["cfg_scale"]) == (30, 7.0)
    assert config.model["from_pretrained"] == "hpcai-tech/OpenSora-STDiT-v3"


def test_all_errors_come_at_once(values):
    found = errors_of(
        {
            **values,
            "learning_rate": 1,
            "seed": "x",
            "reward_fn": "pickscore",
            "decode_frame": 9,
            "prompt_path": "none.txt",
            "backprop_mode": "first",
            "scheduler": dict(type="rflow", num_sampling_steps=0, cfg_scale=3.0, cfg=1),
        }
    )
    for key in ("learning_rate", "seed", "pickscore", "decode_frame", "prompt_path", "backprop_mode", "cfg"):
        assert any(key in sentence for sentence in found), key
    assert len(found) == len(set(found))
    assert all("\n" not in sentence for sentence in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(image_size=None, resolution="241p"), "resolution='241p' is unknown; choose one of 144p"),
        (dict(image_size=None, aspect_ratio="7:7"), "aspect_ratio='7:7' does not exist at resolution '240p'"),
        (dict(image_size=(0, 32)), "height, width and num_frames must be positive"),
        (dict(image_size=(4, 4)), "image_size"),
        (dict(image_size=None, resolution=None), "give image_size=.* or resolution and aspect_ratio"),
        (dict(num_frames="3s"), "num_frames='3s' is not valid"),
        (dict(num_frames=16), "num_frames=16 is too short for scheduler.use_timestep_transform"),
        (dict(multi_resolution=None), "multi_resolution must be 'STDiT2'"),
        (dict(adam_betas=(0.9, 1.0)), "adam_betas must be at least 0 and below 1"),
        (dict(prompt=['a fox {"x"']), "malformed JSON"),
        (dict(start_index=99), r"no prompts between start_index \(99\)"),
        (dict(decode_frame=5), "decode_frame 5 is out of range: the video has 5 latent frames, 0 to 4"),
        (dict(decode_frame="some"), "decode_frame must be -1, fml, all, alt or the number"),
        (dict(backprop_steps=5), r"backprop_steps must be between 1 and num_sampling_steps \(4\), got 5"),
        (dict(backprop_mode="specific"), "keeps gradients from step 15, but num_sampling_steps is 4"),
        (dict(backbone="wan"), "backbone must be one of opensora, got 'wan'"),
        (dict(vae={}), "vae must be an entry with a type"),
        (dict(mixed_precision="fp8"), "mixed_precision='fp8' is not supported.*dtype='fp8'"),
        (dict(lora_dropout=1.0), "lora_dropout must be below 1, got 1.0"),
        (dict(loop=2), "loop is for inference; remove it or set is_vader_training=False"),
        (dict(prompt_path=None), "no prompts: set prompt_path"),
        (dict(prompt=[" "]), "prompt is empty; give at least one prompt"),
        (dict(start_index=3, end_index=2), r"end_index \(2\) must be above start_index \(3\)"),
        (dict(lora_ckpt_path="nowhere"), "lora_ckpt_path: there is no file or folder 'nowhere'"),
        (dict(reward_fn="beauty"), "beauty"),
    ],
)
def test_values_that_cannot_be_are_named(values, changes, message):
    found = errors_of({**values, **changes})
    assert any(re.search(message, sentence) for sentence in found), found


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        ("model", dict(type="STDiT4"), r"model.type is 'STDiT4'; it must be STDiT3-XL/2 or STDiT3-3B/2"),
        ("model", dict(type="t5"), "model.type is 't5'; it must be STDiT3-XL/2"),
        ("vae", dict(type="VAE_Temporal"), "vae.type is 'VAE_Temporal'; it must be OpenSoraVAE_V1_2"),
        ("text_encoder", dict(type="OpenSoraVAE_V1_2"), "text_encoder.type is .*; it must be t5"),
        (
            "model",
            dict(from_pretrained="./none"),
            r"model.from_pretrained: there is no file or folder './none'",
        ),
        ("vae", dict(from_pretrained=None), "vae.from_pretrained is missing; set it to a hub id"),
        ("model", dict(type=["STDiT3-XL/2"]), "model.type is "),
        ("model", dict(qk_nrm=True), "model: unknown key 'qk_nrm': did you mean 'qk_norm'?"),
        ("vae", dict(micro_batchsize=4), "vae: unknown key 'micro_batchsize': did you mean"),
        ("vae", dict(micro_frame_size="17"), "vae.micro_frame_size must be a whole number"),
        ("text_encoder", dict(model_max_length=0), "text_encoder.model_max_length must be a whole number"),
        ("scheduler", dict(num_sampling_steps="many"), "scheduler.num_sampling_steps has the wrong type"),
        ("scheduler", dict(cfg_scale=None), "scheduler.cfg_scale is missing"),
        ("scheduler", dict(type="ddim"), "scheduler.type must be 'rflow', got 'ddim'"),
        ("scheduler", dict(cfg=7), "scheduler.cfg is not known; allowed are"),
        ("scheduler", dict(cfg_scale="7"), "scheduler.cfg_scale has the wrong type: '7'"),
        ("scheduler", dict(num_sampling_steps=True), "scheduler.num_sampling_steps has the wrong type: True"),
    ],
)
def test_entries_that_cannot_be_are_named(values, entry, changes, message):
    found = errors_of({**values, entry: {**values[entry], **changes}})
    assert any(re.search(message, sentence) for sentence in found), found


def test_an_adapter_is_trained_on_with_the_scaling_it_has(values, tmp_path):
    """Under another alpha or rank the same weights would be another adapter from the first step on."""
    model = lora.attach(nn.Sequential(nn.Linear(4, 4)), ["0"], rank=3, alpha=5)
    lora.save(model, tmp_path / "adapter")
    values |= dict(lora_ckpt_path=str(tmp_path / "adapter"))
    (sentence,) = errors_of({**values, "lora_rank": 3, "lora_alpha": 8})
    assert "has lora_alpha=5, the configuration lora_alpha=8" in sentence and sentence.endswith(
        "set lora_alpha=5"
    )
    assert errors_of({**values, "lora_rank": 4})[0].endswith("set lora_rank=3 and lora_alpha=5")
    build_config({**values, "lora_rank": 3, "lora_alpha": 5})
    build_config({**values, "is_vader_training": False})  # inference goes by the adapter


def test_a_config_file_that_is_none(tmp_path):
    with pytest.raises(
        ConfigError, match="config file '.*none.py' does not exist; give the path of a .py config"
    ):
        load_config([str(tmp_path / "none.py")])
    (tmp_path / "broken.py").write_text("lr = = 3")
    with pytest.raises(ConfigError, match="broken.py' cannot be read: .*SyntaxError"):
        load_config([str(tmp_path / "broken.py")])


def test_malformed_overrides_are_named(file):
    with pytest.raises(ConfigError, match="--cfg-options takes KEY=VALUE, got 'lr'"):
        load_config([file, "--cfg-options", "lr", "1e-4"])


@pytest.mark.parametrize(
    "key, value",
    [("prefix_cache", 2), ("grad_checkpoint", "keep_attention"), ("dtype", "fp8"), ("base_quant", "nf4")],
)
def test_what_does_not_compile_is_refused_of_compiled_blocks(values, key, value):
    (sentence,) = errors_of(values, compile_blocks=True, **{key: value})
    assert sentence.startswith(f"compile_blocks=True and {key}={value!r} do not go together")


def test_a_family_without_blocks_is_asked_for_none(values, monkeypatch):
    for method in ("compile_blocks", "residual_branches"):
        monkeypatch.setattr(OpenSora, method, getattr(Backbone, method))
    assert "no blocks to compile" in errors_of(values, compile_blocks=True)[0]
    assert "no blocks whose outputs" in errors_of(values, prefix_cache=2)[0]


def test_what_upstreams_package_lacks_is_refused_before_anything_loads(values, monkeypatch):
    monkeypatch.setattr(opensora, "set_grad_checkpoint", lambda model: None)
    (sentence,) = errors_of(values, grad_checkpoint="keep_attention")
    assert "grad_checkpoint='keep_attention' is not in upstream's opensora package" in sentence
