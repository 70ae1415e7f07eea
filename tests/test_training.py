"""Whole runs of the tiny twin: what lies in the run folder, resuming, sampling, precisions."""

import csv
import math
from pathlib import Path

import av
import pytest
import torch
import twin_runs
from safetensors.torch import load_file

from Core.backbones import base
from Core.config import load_config


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def metrics(run: Path) -> list[dict[str, float]]:
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


def video_frames(path: Path) -> list:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="module", autouse=True)
def double_precision():
    """Compute in float64: equal runs then agree closely, whatever order their sums are taken in.

    In float32, Adam turns the rounding of a gradient that is nearly zero into a step of visible size.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(base.DTYPES, "fp32", torch.float64)
        yield


@pytest.fixture(scope="module")
def run(twin, tmp_path_factory) -> Path:
    """Folder of a finished run of four steps."""
    folder = tmp_path_factory.mktemp("training") / "run"
    options = dict(max_train_steps=4, validation_steps=2, checkpointing_steps=2, num_val_runs=2)
    assert twin_runs.start(twin, folder, **options) == 0
    return folder


def test_the_adapter_has_learned_and_is_in_pefts_layout(run):
    names = {path.name for path in (run / "adapter").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json"}
    outputs = [value for key, value in adapter(run).items() if "lora_B" in key]
    assert outputs and all(value.isfinite().all() and value.any() for value in outputs)


def test_every_step_has_its_row(run):
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"reward", "loss", "grad_norm", "lr", "seconds", "skipped"} <= rows[0].keys()
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows)


def test_the_resolved_config_starts_the_same_run(run):
    config = load_config([str(run / "config.py")]).flat()
    assert (config["max_train_steps"], config["lora_rank"], config["project_dir"]) == (4, 4, str(run))


def test_validation_videos_are_there_before_and_after(run):
    for step in (0, 2, 4):
        videos = sorted((run / "samples" / f"step_{step:06d}").glob("*.mp4"))
        assert len(videos) == 2
        frames = video_frames(videos[0])
        assert len(frames) == 17 and frames[0].shape == (32, 32, 3)
    with open(run / "validation.csv", encoding="utf-8", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [0, 2, 4]


def test_the_log_and_the_checkpoints_are_there(run):
    assert "the adapter is in" in (run / "log.txt").read_text(encoding="utf-8")
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == "step_000004"


def test_a_run_in_two_parts_is_the_run_in_one(run, twin, tmp_path):
    options = dict(validation_steps=2, checkpointing_steps=2, num_val_runs=2)
    for steps in (2, 4):
        assert twin_runs.start(twin, tmp_path / "run", max_train_steps=steps, **options) == 0
    assert largest_difference(adapter(run), adapter(tmp_path / "run")) <= 1e-6
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in metrics(run)], rel=1e-6)


def test_a_finished_run_takes_no_further_step(run, twin):
    before = metrics(run)
    options = dict(max_train_steps=4, validation_steps=2, checkpointing_steps=2, num_val_runs=2)
    assert twin_runs.start(twin, run, **options) == 0
    assert metrics(run) == before


def test_other_settings_do_not_continue_a_run(run, twin, capfd):
    assert twin_runs.start(twin, run, "--lr", "1e-5", max_train_steps=6) == 2
    message = capfd.readouterr().err
    assert "lr was 0.001 and is 1e-05" in message and "resume='never'" in message


def test_a_start_that_fails_leaves_the_earlier_run_where_it_is(run, twin, tmp_path):
    before = metrics(run)
    again = ["--resume", "never", "--lora-ckpt-path", str(tmp_path / "missing")]
    assert twin_runs.start(twin, run, *again) == 2
    assert twin_runs.start(twin, run, "--resume", "never", model=dict(from_pretrained=str(tmp_path))) == 2
    assert metrics(run) == before and not (run / "previous_1").exists()


def test_another_seed_is_another_run(run, twin, tmp_path):
    assert twin_runs.start(twin, tmp_path / "run", seed=1, max_train_steps=1) == 0
    assert metrics(tmp_path / "run")[0]["loss"] != metrics(run)[0]["loss"]


def sample(twin: Path, folder: Path, *flags: str) -> list:
    """First frame of each of two videos made by the command line."""
    assert twin_runs.start(twin, folder, "--is-vader-training", "False", "--end-index", "2", *flags) == 0
    videos = sorted(folder.glob("*.mp4"))
    assert len(videos) == 2
    return [video_frames(path)[0] for path in videos]


def test_inference_uses_the_adapter_as_strongly_as_asked(run, twin, tmp_path):
    trained = str(run / "adapter")
    base = sample(twin, tmp_path / "base")
    adapted = sample(twin, tmp_path / "adapted", "--lora-ckpt-path", trained)
    off = sample(twin, tmp_path / "off", "--lora-ckpt-path", trained, "--lora-scale", "0")
    assert all((one == other).all() for one, other in zip(base, off, strict=True))
    assert not any((one == other).all() for one, other in zip(base, adapted, strict=True))


def test_training_starts_from_an_adapter(run, twin, tmp_path):
    trainer = twin_runs.built_trainer(twin, tmp_path / "run", lora_ckpt_path=str(run / "adapter"))
    # An adapter is read in float32, whatever it was trained in.
    assert largest_difference(adapter(run), dict(trainer.named_parameters)) <= 1e-7


@pytest.mark.parametrize(
    "options",
    [
        dict(dtype="bf16", mixed_precision="bf16"),
        dict(dtype="fp8", mixed_precision="bf16"),
        dict(dtype="fp32", mixed_precision="bf16", grad_checkpoint=False),
        dict(use_AdamW8bit=True),
        dict(decode_frame="fml", backprop_mode="rand"),
        dict(lora_dropout=0.2, is_sample_preview=True),
    ],
    ids=str,
)
def test_a_step_with(options, twin, tmp_path):
    trainer = twin_runs.built_trainer(twin, tmp_path / "run", **options)
    before = [p.detach().clone() for p in trainer.parameters]
    result = trainer.train_step()
    assert math.isfinite(result.loss) and result.grad_norm > 0 and not result.skipped
    moved = [bool((p != start).any()) for p, start in zip(trainer.parameters, before, strict=True)]
    assert any(moved) and all(p.isfinite().all() for p in trainer.parameters)


def test_eight_bit_storage_halves_the_frozen_weights(twin, tmp_path):
    sizes = {}
    for dtype in ("bf16", "fp8"):
        trainer = twin_runs.built_trainer(twin, tmp_path / dtype, dtype=dtype)
        weights = [p for p in trainer.backbone.denoiser.parameters() if not p.requires_grad and p.dim() == 2]
        sizes[dtype] = sum(p.numel() * p.element_size() for p in weights)
    assert 0.5 <= sizes["fp8"] / sizes["bf16"] < 0.7
