"""The configuration: files, overrides and flags in, one checked object out."""

import json
import re
import runpy
from collections import Counter
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import twins
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from Core.backbones import BACKBONES, Backbone, FamilySettings
from Core.backbones.opensora import OpenSora, OpenSoraSettings
from Core.build import new_backbone
from Core.config import ConfigError, build_config, load_config
from Core.config.files import read_file
from Core.config.load import RETIRED
from Core.config.schema import keys_of, sections_of
from Core.modules import lora
from Core.utils.options import default_of, fits
from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

ROOT = Path(__file__).resolve().parents[1]
WIDE = {**twins.STDIT, "hidden_size": 96}
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
# Every key with its field.
KNOWN = keys_of(sections_of({}))


class Plain(Backbone):
    """A family without keys of its own and without blocks, which obeys none of the optional keys."""

    settings_class = FamilySettings

    frame_size = classmethod(lambda cls, resolution, aspect_ratio: (32, 32))
    frame_count = classmethod(lambda cls, num_frames, fps: 17)
    count_latent_frames = classmethod(lambda cls, num_frames, settings: 5)
    num_sampling_steps = classmethod(lambda cls, settings: 4)


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
    assert set((INHERITED + " " + VADER).split()) <= set(KNOWN)
    assert {key: default_of(KNOWN[key]) for key in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS


def test_every_key_belongs_to_one_section():
    sections = Counter(entry.name for schema in sections_of({}).values() for entry in fields(schema))
    assert set(sections.values()) == {1} and sections.keys() == KNOWN.keys()


def test_every_key_is_read_by_the_program():
    """A key that nothing reads would be ignored in silence."""
    sources = [path for folder in ("Core", "scripts") for path in (ROOT / folder).rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    owners = "|".join(["config", "self", "settings", "files", *sections_of({})])
    unread = [key for key in KNOWN if not re.search(rf"\b({owners})\.{key}\b|\"{key}\"", text)]
    assert unread == []


@pytest.fixture
def plain(values, monkeypatch) -> dict:
    """Values for the family ``Plain``."""
    monkeypatch.setitem(BACKBONES, "plain", Plain)
    own = {entry.name for entry in fields(OpenSoraSettings)} | {"dtype"}
    return {key: value for key, value in values.items() if key not in own} | {"backbone": "plain"}


def test_a_family_is_not_given_the_keys_of_another(plain):
    assert build_config(plain).family == FamilySettings()
    loops = {**plain, "is_vader_training": False, "loop": 2}
    assert errors_of(loops) == [
        "loop is a key of backbone 'opensora', which is not the one chosen; remove it"
    ]


@pytest.mark.parametrize(
    ("key", "value"), [("compile_blocks", True), ("base_quant", "nf4"), ("text_encoding", "cpu")]
)
def test_what_has_no_effect_on_a_family_is_refused(plain, key, value):
    sentence = f"{key}={value!r} has no effect on backbone='plain'; remove it"
    assert errors_of(plain, **{key: value}) == [sentence]


def test_a_configuration_cannot_be_changed(values):
    config = build_config(values)
    with pytest.raises(FrozenInstanceError):
        config.optimizer.lr = 1.0
    with pytest.raises(FrozenInstanceError):
        config.optimizer = None


@pytest.mark.parametrize("key", RETIRED)
def test_retired_keys_may_say_that_they_are_off(values, key):
    assert build_config({**values, key: 1}) == build_config(values)
    assert errors_of({**values, key: 2}) == [
        f"{key} was removed, since measurement showed no gain; remove it"
    ]


def test_a_video_in_other_numbers_is_another_video(values):
    """Nor is one of another family, nor one whose captions were encoded in other numbers."""
    bf16 = build_config(values).video_settings()
    for key, value in (("backbone", "opensora"), ("base_quant", "none"), ("text_encoding", "device")):
        assert bf16[key] == value
    for key, value in (("base_quant", "nf4"), ("text_encoding", "8bit"), ("dtype", "bf16")):
        assert build_config({**values, key: value}).video_settings() == {**bf16, key: value}
    # What does not show in a video replaces none.
    assert build_config({**values, "lr": 1.0, "verbose": 2}).video_settings() == bf16


def test_flags_win_over_overrides_and_those_over_the_file(file):
    config = load_config(
        [file, "--lr", "3e-4", "--cfg-options", "lr=1e-5", "seed=7", "scheduler.cfg_scale=1.5"]
    )
    assert (config.optimizer.lr, config.run.seed) == (3e-4, 7)
    assert config.family.scheduler["cfg_scale"] == 1.5
    assert config.family.scheduler["num_sampling_steps"] == 4


def test_flags_of_keys_inside_an_entry(file, twin):
    config = load_config(
        [file, "--cfg-scale", "2.5", "--num-sampling-steps", "3", "--ckpt-path", str(twin / "stdit")]
    )
    scheduler = config.family.scheduler
    assert (scheduler["cfg_scale"], scheduler["num_sampling_steps"]) == (2.5, 3)
    assert config.family.model["from_pretrained"] == str(twin / "stdit")
    assert set(OpenSoraSettings.nested_flags) == {"ckpt_path", "num_sampling_steps", "cfg_scale"}


def test_one_prompt_may_be_given_as_a_string(values):
    assert build_config({**values, "prompt": "a fox"}).prompts.prompt == ["a fox"]


def test_modules_that_a_config_file_imports_are_no_keys(file):
    text = Path(file).read_text()
    Path(file).write_text("import os\n" + text)
    assert load_config([file]).run.seed == 200


def test_saving_and_reading_again_changes_nothing(values, tmp_path):
    config = build_config(
        {**values, "reward_fn": {"pick_score": 1.0}, "reward_args": {"pick_score": values["reward_args"]}}
    )
    config.save(tmp_path / "resolved.py")
    assert load_config([str(tmp_path / "resolved.py")]) == config
    # It is plain Python, and states every key.
    keys = {key for key in runpy.run_path(str(tmp_path / "resolved.py")) if not key.startswith("__")}
    assert keys == set(KNOWN) == set(config.flat())


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_a_config_may_be_yaml_or_json(values, tmp_path, suffix):
    values |= dict(image_size=[32, 32], early_stop=dict(monitor="motion", fall=0.1), end_index=None)
    python = load_config([str(twins.config_file(tmp_path / "config.py", values)), "--lr", "3e-4"])
    other = tmp_path / f"config.{suffix}"
    other.write_text(json.dumps(values) if suffix == "json" else yaml.safe_dump(values), encoding="utf-8")
    assert load_config([str(other), "--lr", "3e-4"]) == python


@pytest.mark.parametrize("as_base", [False, True])
@pytest.mark.parametrize(
    "line",
    [
        "lr: !!python/object/apply:os.mknod [{!r}]",
        "lr: !!python/object/new:os.mknod [{!r}]",
        "lr: !!python/name:os.mknod",
        "custom_imports: {{imports: [code]}}",
    ],
)
def test_nothing_in_a_yaml_file_is_run(tmp_path, monkeypatch, line, as_base):
    trace = tmp_path / "trace"
    (tmp_path / "code.py").write_text(f"import os\nos.mknod({str(trace)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(line.format(str(trace)) + "\n")
    if as_base:
        (tmp_path / "own.py").write_text("_base_ = ['config.yaml']\n")
        file = tmp_path / "own.py"
    with pytest.raises(ConfigError) as error:
        load_config([str(file), "--check-only"])
    assert not trace.exists()
    assert any("cannot be read" in s or "unknown key 'custom_imports'" in s for s in error.value.errors)


@pytest.mark.parametrize("text", ["1e-3", "1.5e3", "-2E-1", "+1.e2"])
def test_yaml_reads_numbers_as_python_does(tmp_path, text):
    (tmp_path / "config.yaml").write_text(f"lr: {text}\nprompt: '{text}'\n")
    assert read_file(str(tmp_path / "config.yaml")) == {"lr": float(text), "prompt": text}


def test_a_run_folder_is_read_as_data(values, tmp_path):
    """What lies in a folder may be somebody else's: its config.py is not run."""
    config = build_config({**values, "wandb_entity": "{{ $HOME:snow }}{{ fileDirname }}"})
    config.save(tmp_path / "config.py")
    (tmp_path / "config.py").write_text("raise SystemExit\n")
    assert json.dumps(load_config([str(tmp_path)]).flat()) == json.dumps(config.flat())
    assert load_config([str(tmp_path), "--cfg-options", "seed=7", "scheduler.cfg_scale=2"]).run.seed == 7
    for damage in ("", "[]", "{", "[" * 100_000):
        (tmp_path / "config.json").write_text(damage)
        with pytest.raises(ConfigError, match="config.json is no saved configuration"):
            load_config([str(tmp_path)])


@pytest.mark.parametrize("code", ["lr = lambda: 1", "from math import sqrt\nlr = sqrt", "def lr(): pass"])
def test_a_function_is_no_value(file, code):
    Path(file).write_text(Path(file).read_text().replace("lr = 0.001\n", "") + code + "\n")
    with pytest.raises(ConfigError) as error:
        load_config([file])
    (sentence,) = error.value.errors
    assert sentence.startswith("lr must be a number, got ")


def test_helpers_in_a_config_file_are_no_keys(file):
    Path(file).write_text(Path(file).read_text() + "def half(x): return x / 2\nseed = int(half(14))\n")
    assert load_config([file]).run.seed == 7


def test_a_config_file_that_exits_is_an_error(tmp_path):
    (tmp_path / "config.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(ConfigError, match="cannot be read: SystemExit: 0"):
        load_config([str(tmp_path / "config.py")])


def test_other_kinds_of_files_are_named(tmp_path):
    (tmp_path / "config.toml").write_text("lr = 1")
    with pytest.raises(ConfigError, match="config.toml' must end in one of .py, .yaml, .yml, .json"):
        load_config([str(tmp_path / "config.toml")])


@pytest.mark.parametrize("name", ["vader_train.py", "vader_inference.py"])
def test_shipped_configs_load(name, tmp_path, monkeypatch):
    """From any folder; their weights are hub ids, which are looked up only when a run starts."""
    monkeypatch.chdir(tmp_path)
    options = ["--project-dir", str(tmp_path / "run"), "--text-cache", str(tmp_path / "cache")]
    config = load_config([str(SHIPPED / name), *options])
    assert config.run.is_vader_training == (name == "vader_train.py")
    video, scheduler = config.video_spec, config.family.scheduler
    assert (video.height, video.width, video.num_frames) == (276, 368, 51)
    assert (scheduler["num_sampling_steps"], scheduler["cfg_scale"]) == (30, 7.0)
    assert config.family.model["from_pretrained"] == "hpcai-tech/OpenSora-STDiT-v3"


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
        (dict(image_size=(0, 32)), "image_size must be at least 1, got 0"),
        (dict(image_size=(4, 4)), "image_size"),
        (dict(image_size=None, resolution=None), "give image_size=.* or resolution and aspect_ratio"),
        (dict(num_frames="3s"), "num_frames='3s' is not valid"),
        (dict(num_frames=16), "num_frames=16 is too short for scheduler.use_timestep_transform"),
        (dict(multi_resolution=None), "multi_resolution must be 'STDiT2'"),
        (dict(adam_betas=(0.9, 1.0)), "adam_betas must be below 1, got 1.0"),
        (dict(prompt=['a fox {"x"']), "malformed JSON"),
        (dict(start_index=99), r"no prompts between start_index \(99\)"),
        (dict(decode_frame=5), "decode_frame 5 is out of range: the video has 5 latent frames, 0 to 4"),
        (dict(decode_frame="some"), "decode_frame must be -1, fml, all, alt, the number"),
        (dict(backprop_steps=5), r"backprop_steps must be between 1 and num_sampling_steps \(4\), got 5"),
        (dict(backprop_mode="specific"), "keeps gradients from step 15, but num_sampling_steps is 4"),
        (dict(backbone="sora"), "backbone must be one of opensora, wan, .*got 'sora'"),
        (dict(vae={}), "vae must be an entry with a type"),
        (dict(mixed_precision="fp8"), "mixed_precision='fp8' is not supported.*dtype='fp8'"),
        (dict(lora_dropout=1.0), "lora_dropout must be below 1, got 1.0"),
        (dict(loop=2), "loop is for inference; remove it or set is_vader_training=False"),
        (dict(prompt_path=None), "no prompts: set prompt_path"),
        (dict(prompt=[" "]), "prompt must not be empty or hold an empty text; remove it, or give a value"),
        (dict(prompt=["a fox", ""]), "prompt must not be empty or hold an empty text"),
        (dict(prompt=[]), "prompt must not be empty; remove it, or give a value"),
        (dict(lora_targets=[]), "lora_targets must not be empty"),
        (dict(early_stop=dict(monitor="diversity")), "raise num_val_seeds"),
        (dict(early_stop=dict(monitor="motion"), num_frames=1), "needs videos of more than one frame"),
        (
            dict(early_stop=dict(monitor="dynamic_degree"), num_frames=1),
            "needs videos of more than one frame",
        ),
        (dict(start_index=3, end_index=2), r"end_index \(2\) must be above start_index \(3\)"),
        (dict(lora_ckpt_path="nowhere"), "lora_ckpt_path: there is no file or folder 'nowhere'"),
        (dict(reward_fn="beauty"), "beauty"),
        (dict(lora_ckpt_path=""), "lora_ckpt_path must not be empty"),
        (dict(lora_ckpt_path=["base", ""]), "lora_ckpt_path must not be empty or hold an empty text"),
        (dict(project_dir=" "), "project_dir must not be empty"),
        (dict(project_dir="~nobody-here/run"), "project_dir: there is no user 'nobody-here' on this machine"),
        (dict(prompt_path="x" * 300), "prompt_path: a path has at most 255 bytes between slashes"),
        (dict(text_cache="x/" * 3000), "text_cache: a path has at most 255 bytes .* 4095 in all"),
        (dict(project_dir="a\0b"), "project_dir must not hold a null character"),
        (dict(reward_args=dict(model="~nobody-here/clip")), "there is no user 'nobody-here'"),
        (dict(reward_fn="~nobody-here/mine.py:Mine"), "there is no user 'nobody-here'"),
        (dict(reward_args=dict(slice_size=0)), "slice_size must be at least 1, got 0"),
        (dict(reward_fn={"motion": 10**400}), "reward_fn.motion must be at most 1000000000, got 1000"),
        (dict(reward_args=dict(model=len)), "reward_args.model must be data .*, got <built-in function len>"),
        (dict(prompt=["a fox"], end_index=1), "end_index counts lines of prompt_path, which prompt replaces"),
        (dict(prompt=["x" * 10_001]), "prompt must have at most 10000 characters, got 10001"),
        (dict(image_size=(60_000, 60_000)), "height × width × num_frames must be at most 8589934592"),
        (dict(image_size=(2**63, 32)), "image_size must be at most 65536, got"),
        (dict(save_fps=1e12), "save_fps must be at most 1000, got"),
        (dict(fps=0.1, frame_interval=1000), "fps / frame_interval must be at least 0.01"),
        (
            dict(monitors=["motion"], num_frames=1, decode_frame=0),
            "monitors: 'motion' needs videos of at least 2",
        ),
        (
            dict(monitors=["motion"], monitor_args=dict(motion=5)),
            "the arguments of reward 'motion' must be a dict",
        ),
        (
            dict(reward_fn="motion", reward_args={}),
            "reward 'motion' needs at least 2 frames of a video, and gets 1",
        ),
        (
            dict(reward_fn="hinge", reward_args=dict(reward="motion", target=1.0)),
            "reward 'hinge' needs at least 2 frames of a video, and gets 1",
        ),
        (dict(seed=2**64), "seed must be at most 9223372036854775807"),
    ],
)
def test_values_that_cannot_be_are_named(values, changes, message):
    found = errors_of({**values, **changes})
    assert any(re.search(message, sentence) for sentence in found), found


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        (
            "model",
            dict(type="STDiT4"),
            "model.type must be one of 'STDiT3-XL/2', 'STDiT3-3B/2', got 'STDiT4'",
        ),
        ("model", dict(type="t5"), "model.type must be one of 'STDiT3-XL/2', 'STDiT3-3B/2', got 't5'"),
        ("vae", dict(type="VAE_Temporal"), "vae.type must be .*'OpenSoraVAE_V1_2', got 'VAE_Temporal'"),
        (
            "text_encoder",
            dict(type="OpenSoraVAE_V1_2"),
            "text_encoder.type must be .*'t5', got 'OpenSoraVAE_V1_2'",
        ),
        (
            "model",
            dict(from_pretrained="./none"),
            r"model.from_pretrained: there is no file or folder './none'",
        ),
        ("vae", dict(from_pretrained=None), "vae.from_pretrained is missing; set it to a hub id"),
        ("model", dict(type=["STDiT3-XL/2"]), "model.type must be one of .*, got "),
        ("model", dict(qk_nrm=True), "unknown key 'model.qk_nrm': did you mean 'qk_norm'?"),
        (
            "vae",
            dict(micro_batchsize=4),
            "unknown key 'vae.micro_batchsize': did you mean 'micro_batch_size'?",
        ),
        ("vae", dict(micro_frame_size="17"), "vae.micro_frame_size must be a whole number"),
        ("text_encoder", dict(model_max_length=0), "text_encoder.model_max_length must be at least 1, got 0"),
        (
            "scheduler",
            dict(num_sampling_steps="many"),
            "scheduler.num_sampling_steps must be a whole number, got",
        ),
        ("scheduler", dict(cfg_scale=None), "scheduler.cfg_scale must be a number, got None"),
        ("scheduler", dict(type="ddim"), "scheduler.type must be .*'rflow', got 'ddim'"),
        ("scheduler", dict(cfg=7), "unknown key 'scheduler.cfg': did you mean 'cfg_scale'?"),
        ("scheduler", dict(cfg_scale="7"), "scheduler.cfg_scale must be a number, got '7'"),
        (
            "scheduler",
            dict(num_sampling_steps=True),
            "scheduler.num_sampling_steps must be a whole number, got True",
        ),
    ],
)
def test_entries_that_cannot_be_are_named(values, entry, changes, message):
    found = errors_of({**values, entry: {**values[entry], **changes}})
    assert any(re.search(message, sentence) for sentence in found), found


@pytest.mark.parametrize(
    ("entry", "key"),
    [("scheduler", "cfg_scale"), ("scheduler", "num_sampling_steps"), ("text_encoder", "model_max_length")],
)
def test_what_an_entry_must_hold_is_named(values, entry, key):
    rest = {inner: value for inner, value in values[entry].items() if inner != key}
    (sentence,) = errors_of({**values, entry: rest})
    assert sentence.startswith(f"{entry}.{key} is missing; ")


def takes_numbers(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(takes_numbers, get_args(annotation)))


def with_number(annotation: Any, number: Any) -> Any:
    """``number``, or a list of it as long as the type asks for."""
    lists = ([number] * length for length in (1, 2, 3) if fits([1] * length, annotation))
    return next(lists, number)


ENTRIES = {key: fields(KNOWN[key].metadata["entry"]) for key in KNOWN if KNOWN[key].metadata["entry"]}
NUMBERS = {(key,): KNOWN[key].type for key in KNOWN if takes_numbers(KNOWN[key].type)}
NUMBERS |= {
    (key, inner.name): inner.type for key in ENTRIES for inner in ENTRIES[key] if takes_numbers(inner.type)
}


def changed(values: dict, path: tuple[str, ...], value: Any) -> dict:
    if len(path) == 1:
        return {**values, path[0]: value}
    return {**values, path[0]: {**(values.get(path[0]) or {"monitor": "motion"}), path[1]: value}}


@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
def test_what_is_no_finite_number_is_refused_of_every_key(values, path):
    for number in (float("inf"), float("-inf"), float("nan"), 10**400, -(10**400), 10**5000):
        (sentence,) = errors_of(changed(values, path, with_number(NUMBERS[path], number)))
        assert sentence.startswith(f"{'.'.join(path)} must be ") and len(sentence) < 400


@pytest.mark.parametrize(
    "path", [(key, inner.name) for key in ENTRIES for inner in ENTRIES[key]], ids=".".join
)
def test_a_wrong_value_in_an_entry_is_one_sentence(values, path):
    (sentence,) = errors_of(changed(values, path, {"a": "set"}))
    assert sentence.startswith(f"{'.'.join(path)} must be ") and sentence.endswith("got {'a': 'set'}")


def test_wrong_values_in_entries_come_together(values):
    wrong = {"model": {"depth": 0}, "vae": {"micro_batch_size": "4"}, "scheduler": {"cfg": 7}}
    found = errors_of({**values, **{key: {**values[key], **inner} for key, inner in wrong.items()}})
    assert sorted(sentence.split()[0] for sentence in found) == [
        "model.depth",
        "unknown",
        "vae.micro_batch_size",
    ]


def test_an_adapter_is_trained_on_with_the_scaling_it_has(values, tmp_path):
    """Under another alpha or rank the same weights would be another adapter from the first step on."""
    values |= dict(lora_ckpt_path=save_adapter(tmp_path / "adapter", OpenSora.lora_targets))
    (sentence,) = errors_of({**values, "lora_rank": 3, "lora_alpha": 8})
    assert "has lora_alpha=5, but the configuration has lora_alpha=8;" in sentence
    assert sentence.endswith("set lora_alpha=5")
    assert errors_of({**values, "lora_rank": 4})[0].endswith("set lora_rank=3 and lora_alpha=5")
    build_config({**values, "lora_rank": 3, "lora_alpha": 5})
    build_config({**values, "is_vader_training": False})  # inference goes by the adapter


def save_adapter(folder: Path, targets: Sequence[str], model: nn.Module | None = None) -> str:
    """An adapter of rank 3 and alpha 5, for the twin's denoiser if no ``model`` is given."""
    lora.save(lora.attach(model or twins.stdit(), targets, rank=3, alpha=5), folder)
    return str(folder)


def test_adapters_that_cannot_be_are_named_before_anything_loads(values, tmp_path):
    values |= dict(lora_rank=3, lora_alpha=5)
    small = save_adapter(tmp_path / "small", ["0"], nn.Sequential(nn.Linear(4, 4)))
    wide = save_adapter(tmp_path / "wide", ["qkv", "q_linear", "kv_linear"], STDiT3(STDiT3Config(**WIDE)))
    qkv = save_adapter(tmp_path / "qkv", ["qkv"])
    for training in (True, False):
        keys = {**values, "is_vader_training": training}
        assert "does not fit the model: 1 unexpected: 0" in errors_of({**keys, "lora_ckpt_path": small})[0]
        assert "of another shape: spatial_blocks.0.attn" in errors_of({**keys, "lora_ckpt_path": wide})[0]
    (sentence,) = errors_of({**values, "lora_ckpt_path": qkv, "lora_targets": ["kv_linear"]})
    assert sentence.endswith("so set lora_targets=['qkv']")
    for targets in (None, ["attn.qkv"]):
        build_config({**values, "lora_ckpt_path": qkv, "lora_targets": targets})
    (sentence,) = errors_of({**values, "lora_targets": ["qkv", "to_q"]})
    assert sentence.startswith("lora_targets: no layer that can be adapted is named 'to_q'; there are ")
    (sentence,) = errors_of({**values, "lora_ckpt_path": "base"})
    assert sentence.startswith("lora_ckpt_path='base' is for inference; ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model=dict(depth=3)), "model.depth is 3, but the weights in '.*stdit' have 2; set that"),
        (dict(model=dict(patch_size=[1, 4, 4])), r"model.patch_size is \[1, 4, 4\], but the weights"),
        (dict(text_encoder=dict(model_max_length=9)), "text_encoder.model_max_length is 9, but .* have 24"),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_named_before_they_load(values, changes, message):
    (entry,) = changes
    (sentence,) = errors_of({**values, entry: {**values[entry], **changes[entry]}})
    assert re.match(message, sentence)
    build_config(
        {**values, "model": {**values["model"], "depth": 2, "patch_size": (1, 2, 2), "qk_norm": True}}
    )


@pytest.mark.parametrize("flags", [["--lr", "3e-4"], ["--debug"], ["--cfg-options", "lr=1"], ["--lr=1"]])
def test_a_flag_before_the_config_file_is_said_to_be_one(file, flags):
    with pytest.raises(ConfigError, match=f"the config file comes before the flags: CONFIG {flags[0][:4]}"):
        load_config([*flags, file])


def test_a_config_file_that_is_none(tmp_path):
    with pytest.raises(
        ConfigError, match="config file '.*none.py' does not exist; give the path of a config file"
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
    [
        ("grad_checkpoint", "keep_attention"),
        ("grad_checkpoint", "parts"),
        ("dtype", "fp8"),
        ("base_quant", "nf4"),
    ],
)
def test_what_does_not_compile_is_refused_of_compiled_blocks(values, key, value):
    (sentence,) = errors_of(values, compile_blocks=True, **{key: value})
    assert sentence.startswith(f"compile_blocks=True and {key}={value!r} do not go together")


@pytest.mark.parametrize("key, value", [("grad_checkpoint", False), ("grad_checkpoint", "keep_attention")])
def test_offloading_is_refused_where_more_is_saved_than_the_inputs_of_blocks(values, key, value):
    (sentence,) = errors_of(values, activation_offloading=True, **{key: value})
    assert sentence == (
        f"activation_offloading=True and {key}={value!r} do not go together; set activation_offloading=False or "
        f"{key}=True"
    )


def test_what_upstreams_package_lacks_is_refused_before_anything_loads(values, monkeypatch):
    monkeypatch.setattr("opensora.acceleration.checkpoint.set_grad_checkpoint", lambda model: None)
    (sentence,) = errors_of(values, grad_checkpoint="keep_attention")
    assert "grad_checkpoint='keep_attention' is not in upstream's opensora package" in sentence


CONFIGS = sorted(file for file in (ROOT / "configs").glob("*/*.py"))


# Files that the user of a config supplies, with the sentence where they lack.
SUPPLIED = {
    "t2v_14b_4_steps": (
        "loras/wan_t2v_14b_4_steps.safetensors",
        "base_adapters[0]: there is no file or folder",
    ),
    "i2v_a14b": ("pictures/prompts.txt", "prompt_path: prompt file"),
}


def supply(file: Path) -> None:
    """A picture with its prompts, or an adapter."""
    file.parent.mkdir()
    if file.suffix == ".safetensors":
        layer = "diffusion_model.blocks.0.self_attn.q"
        factors = {"lora_down": torch.zeros(4, 5120), "lora_up": torch.zeros(5120, 4)}
        save_file({f"{layer}.{name}.weight": value for name, value in factors.items()}, file)
        return
    Image.new("RGB", (16, 9)).save(file.with_name("fox.png"))
    file.write_text('a fox wakes up {"reference_path": "pictures/fox.png"}\n')


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_config_of_the_repository_is_valid(config, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    if config.stem in SUPPLIED:
        name, sentence = SUPPLIED[config.stem]
        with pytest.raises(ConfigError) as refused:
            load_config([str(config)])
        (error,) = refused.value.errors
        assert error.startswith(sentence) and repr(name) in error
        supply(tmp_path / name)
    loaded = load_config([str(config)])
    assert loaded.models.backbone == config.parent.name
    assert loaded.run.is_vader_training and loaded.run.project_dir.startswith("runs/")
    assert new_backbone(loaded, torch.device("cpu")).settings is loaded.family


def test_an_objective_named_by_a_flag_brings_its_own_defaults(file):
    """Of keys that both objectives have, too: what the file set was for the other."""
    config = load_config([str(file), "--objective", "grpo", "--group-size", "2"])
    assert config.objective.decode_frame == "video"
    config = load_config([str(file), "--objective", "grpo", "--group-size", "2", "--decode-frame", "0"])
    assert config.objective.decode_frame == 0
