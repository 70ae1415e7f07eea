"""A second family and a second objective, each in one file: the examples that the docs show."""

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import twins
from safetensors.torch import load_file

from Core.backbones import BACKBONES
from Core.build import new_backbone
from Core.cli import main
from Core.config import ConfigError, build_config, load_config
from Core.config.files import read_run
from Core.training.objectives import OBJECTIVES
from Core.training.objectives.base import GRADIENT_FREE
from Core.utils.tables import read_table
from scripts import download_weights

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))
CONFIG = str(ROOT / "examples" / "toy_config.py")


@pytest.fixture(scope="module", autouse=True)
def examples():
    """Both examples are registered for these tests alone."""
    import toy_backbone
    import toy_objective

    yield toy_backbone, toy_objective
    del BACKBONES["toy"], OBJECTIVES["one_jump"]
    del sys.modules["toy_backbone"], sys.modules["toy_objective"]


def errors_of(*flags: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config([CONFIG, *flags])
    return error.value.errors


@pytest.fixture(scope="module")
def run(tmp_path_factory, examples) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "run"
    flags = ["--project-dir", str(folder), "--text-cache", str(folder / "text"), "--verbose", "0"]
    assert main([CONFIG, *flags]) == 0
    return folder


def test_a_second_family_trains_saves_and_generates(run, tmp_path):
    rewards = [row["reward"] for row in read_table(run / "metrics.csv")]
    assert len(rewards) == 30 and sum(rewards[-5:]) > sum(rewards[:5])
    assert load_file(run / "adapter" / "adapter_model.safetensors")
    flags = ["--is-vader-training", "False", "--end-index", "2", "--lora-ckpt-path", str(run / "adapter")]
    assert main([CONFIG, *flags, "--project-dir", str(tmp_path / "videos"), "--verbose", "0"]) == 0
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2


def test_its_run_is_saved_with_its_keys_alone(run):
    saved = read_run(run)
    assert (saved["backbone"], saved["sampling_steps"]) == ("toy", 8)
    assert not {"model", "vae", "scheduler", "aes"} & saved.keys()
    assert json.loads(json.dumps(load_config([str(run / "config.py")]).flat())) == saved


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampling-steps", "0"], "sampling_steps must be at least 1, got 0"),
        (
            ["--cfg-options", "aes=6.5"],
            "aes is a key of backbone 'opensora', which is not the one chosen; remove it",
        ),
        (["--cfg-options", "model.depth=3"], "model is a key of backbone 'opensora', which is not"),
        (["--base-quant", "nf4"], "base_quant='nf4' has no effect on backbone='toy'; remove it"),
        (["--guidance-grad", "cond"], "guidance_grad='cond' has no effect on backbone='toy'; remove it"),
        (["--compile-blocks"], "compile_blocks=True has no effect on backbone='toy'; remove it"),
        (["--num-frames", "2s"], "the toy knows no durations such as '2s'"),
        (["--image-size", "60", "64"], r"image_size must be multiples of 8, got (60, 64)"),
        (["--cfg-options", "sampling_step=3"], "unknown key 'sampling_step': did you mean 'sampling_steps'?"),
        (["--latest-jumps", "2"], "unknown flag --latest-jumps"),
    ],
)
def test_what_it_does_not_obey_is_refused_by_name(flags, message):
    found = errors_of(*flags)
    assert any(sentence.startswith(message) for sentence in found), found


def test_its_keys_are_refused_for_open_sora(twin, tmp_path):
    values = twins.settings(twin, tmp_path, palette="mine")
    with pytest.raises(ConfigError) as error:
        build_config(values)
    assert error.value.errors == [
        "palette is a key of backbone 'toy', which is not the one chosen; remove it"
    ]


def test_its_prompts_are_plain_text(tmp_path):
    (tmp_path / "prompts.txt").write_text('a set {"x"}\n|0|stays|as it is\n')
    config = load_config([CONFIG, "--prompt-path", str(tmp_path / "prompts.txt")])
    assert [prompt.reward_text for prompt in config.prompt_list] == ['a set {"x"}', "|0|stays|as it is"]


def test_its_weights_download_through_the_same_table(tmp_path, monkeypatch, capsys):
    """From a hub that holds the palette, by download_weights.py and by a run."""
    palette = (ROOT / "examples" / "palette.safetensors").read_bytes()

    def snapshot_download(source, local_dir=None, local_files_only=False, **_):
        if local_files_only:
            raise OSError("not cached")
        folder = Path(local_dir or tmp_path / "cache")
        folder.mkdir(parents=True, exist_ok=True)
        assert source == "toy/palette"
        (folder / "palette.safetensors").write_bytes(palette)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert download_weights.main(["--model", "toy", "--to", str(tmp_path / "here")]) == 0
    printed = capsys.readouterr().out
    assert "toy/palette palette.safetensors" in printed and "palette = " in printed
    config = load_config([CONFIG, "--palette", "toy/palette"])
    backbone = new_backbone(config, torch.device("cpu"))
    assert backbone.fetch() == []
    backbone.load()
    assert backbone.denoiser.colour.weight.shape == (3, 32)


def test_weights_that_cannot_be_had_are_named_by_their_key():
    config = load_config([CONFIG, "--palette", "toy/elsewhere"])
    (error,) = new_backbone(config, torch.device("cpu")).fetch()
    assert error.startswith("palette: ")


def test_a_second_objective_trains_on_any_family(tmp_path, twin):
    flags = ["--objective", "one_jump", "--latest-jumps", "3", "--verbose", "0"]
    assert main([CONFIG, *flags, "--project-dir", str(tmp_path / "toy")]) == 0
    rewards = [row["reward"] for row in read_table(tmp_path / "toy" / "metrics.csv")]
    assert sum(rewards[-5:]) > sum(rewards[:5])
    values = twins.settings(twin, tmp_path / "twin", objective="one_jump", latest_jumps=2)
    assert main([str(twins.config_file(tmp_path / "twin.py", values))]) == 0
    assert len(read_table(tmp_path / "twin" / "metrics.csv")) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--latest-jumps", "9"], "latest_jumps must be at most 8 for this video, got 9"),
        (["--frame", "9"], "frame must be at most 8 for this video, got 9"),
        (["--latest-jumps", "0"], "latest_jumps must be at least 1, got 0"),
        (["--cfg-options", "backprop_steps=2"], "backprop_steps is a key of objective 'reward_gradient'"),
        (["--backprop-steps", "2"], "unknown flag --backprop-steps"),
    ],
)
def test_an_objective_has_keys_of_its_own(flags, message):
    found = errors_of("--objective", "one_jump", *flags)
    assert any(sentence.startswith(message) for sentence in found), found


def test_an_objective_named_by_a_flag_or_a_child_replaces_the_files_with_its_keys(tmp_path):
    demo = str(ROOT / "Open-Sora/configs/opensora-v1-2/vader/vader_demo.py")
    config = load_config([demo, "--objective", "one_jump", "--project-dir", str(tmp_path)])
    assert config.flat()["latest_jumps"] == 4 and "backprop_steps" not in config.flat()
    child = tmp_path / "child.py"
    child.write_text(f'_base_ = ["{demo}"]\nobjective = "one_jump"\n')
    assert load_config([str(child), "--project-dir", str(tmp_path)]) == config
    child.write_text(child.read_text() + "backprop_steps = 2\n")
    with pytest.raises(ConfigError, match="backprop_steps is a key of objective 'reward_gradient'"):
        load_config([str(child)])


def test_an_unknown_objective_is_refused():
    (error,) = errors_of("--objective", "one_jmp")
    assert error.startswith("objective must be one of reward_gradient, leap, ")
    assert error.endswith("one_jump, got 'one_jmp': did you mean 'one_jump'?")


def test_a_name_in_use_is_refused(examples):
    with pytest.raises(ValueError, match="a backbone named 'toy' exists already; choose another name"):
        BACKBONES.register("toy", object)


@pytest.mark.parametrize(
    ("objective", "flags"),
    [
        ("leap", []),
        ("drtune", []),
        ("direct_align", ["--lr", "0.05"]),
        ("grpo", ["--train-batch-size", "16", "--group-size", "8"]),
    ],
)
def test_objectives_train_another_family(tmp_path, objective, flags):
    """The toy paints the same video from any noise, which leaves nothing to compare for ``nft`` and ``dpo``."""
    folder = tmp_path / "run"
    own = ["--objective", objective, "--max-train-steps", "15", "--validation-steps", "15", *flags]
    shared = ["--project-dir", str(folder), "--text-cache", str(tmp_path / "text"), "--verbose", "0"]
    assert main([CONFIG, *own, *shared]) == 0
    before, after = (row["reward"] for row in read_table(folder / "validation.csv"))
    assert after > before + 0.005


def test_the_objectives_that_need_no_gradient_are_those_that_say_so():
    free = {name for name in OBJECTIVES if not OBJECTIVES.resolve(name).needs_reward_gradient}
    assert free == set(GRADIENT_FREE)
