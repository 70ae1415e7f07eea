"""Command line of the upstream scripts, names of number types, and the log."""

import logging

import pytest
import torch

from opensora.utils.config_utils import parse_configs
from opensora.utils.misc import create_logger, to_torch_dtype

CONFIG = """
resolution = "240p"
num_frames = 51
prompt = ["a cat"]
model = dict(type="STDiT3-XL/2", from_pretrained="hub/model")
scheduler = dict(type="rflow", num_sampling_steps=30, cfg_scale=7.0)
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(CONFIG)
    return str(path)


def test_the_file_alone(config_file):
    config = parse_configs(argv=[config_file])
    assert (config.resolution, config.num_frames, config.scheduler.cfg_scale) == ("240p", 51, 7.0)
    assert "seed" not in config


def test_flags_override_the_file(config_file):
    flags = (
        "--num-frames 4s --seed 3 --image-size 240 426 --aes 6 --mask-strategy 0 0,1 --camera-motion static"
    )
    config = parse_configs(argv=[config_file, *flags.split(), "--prompt", "a dog", "a fox"])
    assert (config.num_frames, config.seed, config.image_size) == ("4s", 3, [240, 426])
    assert (config.aes, config.mask_strategy, config.camera_motion) == (6.0, ["0", "0,1"], "static")
    assert config.prompt == ["a dog", "a fox"]
    assert config.resolution == "240p"


def test_flags_of_nested_keys(config_file):
    flags = "--ckpt-path local/model --num-sampling-steps 10 --cfg-scale 4.5"
    config = parse_configs(argv=[config_file, *flags.split()])
    assert config.model.from_pretrained == "local/model"
    assert (config.scheduler.num_sampling_steps, config.scheduler.cfg_scale) == (10, 4.5)
    assert not {"ckpt_path", "num_sampling_steps", "cfg_scale"} & set(config)


def test_any_key_can_be_set(config_file):
    config = parse_configs(argv=[config_file, "--cfg-options", "scheduler.cfg_scale=2.5", "align=5"])
    assert (config.scheduler.cfg_scale, config.align) == (2.5, 5)
    assert "cfg_options" not in config


def test_training_has_its_own_flags(config_file, capsys):
    assert parse_configs(training=True, argv=[config_file, "--lr", "1e-4"]).lr == 1e-4
    with pytest.raises(SystemExit):
        parse_configs(training=True, argv=[config_file, "--save-fps", "8"])
    assert "--save-fps" in capsys.readouterr().err


def test_the_command_line_of_the_process_is_the_default(config_file, monkeypatch):
    monkeypatch.setattr("sys.argv", ["inference.py", config_file, "--fps", "12"])
    assert parse_configs().fps == 12


def test_missing_file_and_missing_section(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; give the path of an mmengine config file"):
        parse_configs(argv=[str(tmp_path / "none.py")])
    path = tmp_path / "bare.py"
    path.write_text("resolution = '240p'")
    with pytest.raises(ValueError, match="--cfg-scale sets scheduler.cfg_scale.*has no 'scheduler'"):
        parse_configs(argv=[str(path), "--cfg-scale", "4"])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp32", torch.float32),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
    ],
)
def test_names_of_number_types(name, dtype):
    assert to_torch_dtype(name) is dtype
    assert to_torch_dtype(dtype) is dtype


def test_unknown_number_type():
    with pytest.raises(ValueError, match="dtype='int8' is unknown; use one of fp32"):
        to_torch_dtype("int8")


@pytest.fixture
def restored_logger():
    yield
    logger = logging.getLogger("opensora")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


def test_the_first_process_writes_each_line_once(tmp_path, monkeypatch, capsys, restored_logger):
    monkeypatch.setenv("RANK", "0")
    create_logger(tmp_path / "logs")
    create_logger(tmp_path / "logs").info("step %d", 1)
    assert (tmp_path / "logs" / "log.txt").read_text().count("step 1") == 1
    assert capsys.readouterr().err.count("step 1") == 1


def test_other_processes_are_silent(tmp_path, monkeypatch, capsys, restored_logger):
    monkeypatch.setenv("RANK", "1")
    create_logger(tmp_path / "logs").info("step 1")
    assert not (tmp_path / "logs").exists()
    assert capsys.readouterr().err == ""
