"""Whole runs in this process: options together, what resuming refuses, exports, trackers."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import twin_runs
from safetensors.torch import load_file
from twins import config_file, settings

from Core.cli import main
from Core.generation.manifest import read_manifest
from Core.modules import lora
from Core.training.checkpoint import Checkpoints
from Core.training.objectives import OBJECTIVES
from opensora.registry import MODELS, build_module

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def configured(twin, tmp_path_factory):
    """A function that writes the config of a two-step run named so, with keys overridden."""
    folder = tmp_path_factory.mktemp("runs")

    def write(name: str, **overrides) -> tuple[Path, Path]:
        values = settings(twin, folder / name) | dict(num_frames=1, decode_frame=0, max_train_steps=2)
        values["scheduler"] = values["scheduler"] | {"num_sampling_steps": 2}
        return config_file(folder / f"{name}.py", values | overrides), folder / name

    return write


@pytest.fixture(scope="module")
def finished(configured):
    """A finished run with most options on: (config file, run folder)."""
    config, run = configured(
        "finished",
        use_AdamW8bit=True,
        ema_decay=0.9,
        kl_weight=1.0,
        guidance_grad="cond",
        lr_schedule="cosine",
        monitors=["sharpness"],
        num_val_seeds=2,
        lora_alpha=4,
        logger_type="tensorboard",
    )
    assert main([str(config)]) == 0
    return config, run


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_validation_measures_monitors_and_diversity_on_fixed_seeds(finished):
    _, run = finished
    before, after = rows(run / "validation.csv")
    assert {"reward", "sharpness", "diversity", "train_reward"} <= after.keys()
    assert float(before["diversity"]) > 0 and before["train_reward"] == "" and after["train_reward"] != ""
    seeds = [entry["seed"] for entry in read_manifest(run / "samples" / "step_000002")]
    assert seeds == [200, 201]
    assert float(rows(run / "metrics.csv")[-1]["base_distance"]) > 0


def test_the_run_exports_its_moving_average_and_keeps_both(finished):
    _, run = finished
    state = Checkpoints(run / "checkpoints", 1).newest().state()
    exported = load_file(run / "adapter" / lora.WEIGHTS)
    raw = load_file(run / "checkpoints" / "step_000002" / "adapter" / lora.WEIGHTS)
    assert all(torch.equal(exported[key], state["ema"]["average"][key]) for key in exported)
    assert any(not torch.equal(exported[key], raw[key]) for key in exported)


def test_a_cosine_run_in_8_bits_continues_bit_for_bit(finished, configured):
    _, run = finished
    config, again = configured("again", **{**_overrides(finished), "checkpointing_steps": 1})
    assert main([str(config)]) == 0
    shutil.rmtree(again / "checkpoints" / "step_000002")
    assert main([str(config)]) == 0
    assert (again / "adapter" / lora.WEIGHTS).read_bytes() == (run / "adapter" / lora.WEIGHTS).read_bytes()
    first, second = (Checkpoints(r / "checkpoints", 1).newest().state()["optimizer"] for r in (run, again))
    for key, slots in first["state"].items():
        for name, value in slots.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, second["state"][key][name])


def _overrides(finished) -> dict:
    """The keys of a finished run's own config file that a run beside it takes over."""
    from mmengine.config import Config as FileConfig

    values = FileConfig.fromfile(str(finished[0])).to_dict()
    return {key: value for key, value in values.items() if key != "project_dir"}


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--lr", "0.5", "--lora-alpha", "9"], ["lr was 0.001 and is 0.5", "lora_alpha was 4 and is 9"]),
        (["--train-batch-size", "4"], ["global batch was 2 and is 4"]),
        (["--max-train-steps", "9"], ["max_train_steps was 2 and is 9"]),
        (["--end-index", "2"], ["text of the prompts"]),
        (["--check-only", "--lr", "0.5"], ["lr was 0.001 and is 0.5"]),
        (["--check-only", "2"], ["global batch was 2 and is 4"]),
    ],
)
def test_a_config_that_contradicts_the_checkpoint_is_refused(finished, capsys, flags, named):
    config, _ = finished
    assert main([str(config), *flags]) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in named) and "resume='never'" in message


def test_a_key_that_a_later_version_brought_does_not_contradict(finished, tmp_path):
    config, run = finished
    run = shutil.copytree(run, tmp_path / "run")
    checkpoint = Checkpoints(run / "checkpoints", 1).newest()
    manifest = checkpoint.manifest()
    del manifest["config"]["compile_blocks"]
    (checkpoint.folder / "manifest.json").write_text(json.dumps(manifest))
    arguments = [str(config), "--project-dir", str(run), "--check-only"]
    assert main(arguments) == 0
    assert main([*arguments, "--compile-blocks"]) == 2


def test_a_run_of_an_earlier_version_continues(configured):
    """Its config and its checkpoint hold keys that were removed, and no objective."""
    config, run = configured("earlier", checkpointing_steps=1)
    assert main([str(config)]) == 0
    adapter = (run / "adapter" / lora.WEIGHTS).read_bytes()
    shutil.rmtree(run / "checkpoints" / "step_000002")
    retired = {"prefix_cache": 1, "noise_repeats": 1}
    file = run / "checkpoints" / "step_000001" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["config"] |= retired
    del manifest["config"]["objective"]
    file.write_text(json.dumps(manifest))
    own = config.with_name("own.py")
    lines = [line for line in (run / "config.py").read_text().splitlines() if "objective" not in line]
    own.write_text("\n".join([*lines, *(f"{key} = {value}" for key, value in retired.items())]))
    assert main([str(own)]) == 0
    assert [row["step"] for row in rows(run / "metrics.csv")] == ["1", "2"]
    assert (run / "adapter" / lora.WEIGHTS).read_bytes() == adapter
    assert "continuing from" in (run / "log.txt").read_text()


@pytest.mark.parametrize("recorded", [True, False])
def test_another_objective_does_not_continue_a_run(finished, tmp_path, monkeypatch, capsys, recorded):
    config, run = finished
    run = shutil.copytree(run, tmp_path / "run")
    if not recorded:
        file = run / "checkpoints" / "step_000002" / "manifest.json"
        manifest = json.loads(file.read_text())
        del manifest["config"]["objective"]
        file.write_text(json.dumps(manifest))
    monkeypatch.setitem(OBJECTIVES, "another", OBJECTIVES["reward_gradient"])
    assert main([str(config), "--project-dir", str(run), "--objective", "another"]) == 2
    assert "objective was 'reward_gradient' and is 'another'" in capsys.readouterr().err


def test_a_run_that_used_a_removed_option_is_not_continued_without_it(finished, tmp_path, capsys):
    config, run = finished
    run = shutil.copytree(run, tmp_path / "run")
    file = run / "checkpoints" / "step_000002" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["config"]["noise_repeats"] = 4
    file.write_text(json.dumps(manifest))
    assert main([str(config), "--project-dir", str(run)]) == 2
    assert "noise_repeats was 4 and is 1" in capsys.readouterr().err


def test_a_check_leaves_a_save_in_the_making_alone(finished, tmp_path):
    config, run = finished
    run = shutil.copytree(run, tmp_path / "run")
    partial = run / "checkpoints" / ".step_000009.partial"
    partial.mkdir()
    before = sorted(run.rglob("*"))
    assert main([str(config), "--project-dir", str(run), "--check-only", "1"]) == 0
    assert sorted(run.rglob("*")) == before


def test_a_check_by_itself_does_not_guess_the_number_of_processes(finished, capsys):
    config, _ = finished
    assert main([str(config), "--train-batch-size", "4", "--check-only"]) == 0
    assert main([str(config), "--check-only", "0"]) == 2
    assert "check_only must be at least 1, got 0" in capsys.readouterr().err


def test_never_begins_anew_and_keeps_the_old_run(finished, configured):
    config, run = configured("anew")
    for flags in ([], ["--resume", "never", "--lr", "0.5"]):
        assert main([str(config), *flags]) == 0
        (run / "evaluation").mkdir(exist_ok=True)
    assert [row["step"] for row in rows(run / "metrics.csv")] == ["1", "2"]
    assert (run / "previous_1" / "checkpoints" / "step_000002" / "manifest.json").is_file()
    assert (run / "previous_1" / "metrics.csv").is_file()
    assert (run / "previous_1" / "evaluation").is_dir()  # its results are not shown as the new run's


def test_going_back_to_an_earlier_checkpoint_moves_the_later_ones_aside(configured):
    config, run = configured("back", checkpointing_steps=1)
    assert main([str(config)]) == 0
    earlier = run / "checkpoints" / "step_000001"
    assert main([str(config), "--resume", str(earlier)]) == 0
    assert (run / "previous_1" / "checkpoints" / "step_000002").is_dir()
    assert [checkpoint.step for checkpoint in Checkpoints(run / "checkpoints", 1).all()] == [1, 2]
    (earlier / "state.pt").write_bytes(b"")
    assert main([str(config), "--resume", str(earlier)]) == 2


@pytest.mark.parametrize("form", ["peft", "safetensors"])
def test_exports_are_read_again_with_their_scaling(finished, tmp_path, form):
    _, run = finished
    out = tmp_path / ("out" if form == "peft" else "out.safetensors")
    assert export(run / "adapter", out, "--format", form) == 0
    one, two = lora.read(run / "adapter"), lora.read(out)
    assert (one.rank, one.alpha, one.targets) == (two.rank, two.alpha, two.targets) == (4, 4, one.targets)
    assert all(torch.equal(one.state[key], two.state[key]) for key in one.state)


def test_merged_weights_do_what_the_adapter_does(finished, twin, tmp_path):
    """Whatever the config does to fit a small GPU."""
    config, run = finished
    child = tmp_path / "small_gpu.py"
    child.write_text(f"_base_ = [{str(config)!r}]\nstream_blocks = True\n")
    assert export(run / "adapter", tmp_path / "out", "--format", "merged", "--config", str(child)) == 0
    entry = dict(type="STDiT3-XL/2", input_size=(1, 4, 4), in_channels=4, model_max_length=24)
    base = build_module(entry | {"from_pretrained": str(twin / "stdit")}, MODELS).eval()
    merged = build_module(entry | {"from_pretrained": str(tmp_path / "out")}, MODELS).eval()
    adapter = lora.read(run / "adapter")
    adapted = lora.attach(base, adapter.targets, rank=adapter.rank, alpha=adapter.alpha)
    lora.load(adapted, adapter, "the run's")
    torch.manual_seed(0)
    inputs = dict(x=torch.randn(1, 4, 1, 4, 4), timestep=torch.tensor([500.0]), y=torch.randn(1, 1, 6, 32))
    inputs |= dict(mask=torch.ones(1, 6), fps=torch.tensor([24.0]))
    inputs |= dict(height=torch.tensor([32.0]), width=torch.tensor([32.0]))
    with torch.no_grad():
        torch.testing.assert_close(adapted(**inputs), merged(**inputs), rtol=1e-5, atol=1e-5)


def test_an_export_never_overwrites(finished, tmp_path, capsys):
    _, run = finished
    assert export(run / "adapter", tmp_path) == 2
    assert "exists already" in capsys.readouterr().err
    assert export(run / "adapter", tmp_path / "x", "--format", "merged") == 2


def export(*arguments) -> int:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from export_adapter import main as run_export
    finally:
        sys.path.pop(0)
    return run_export([str(argument) for argument in arguments])


def test_tensorboard_gets_scalars_and_moving_pictures(configured):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, run = configured("board", logger_type="tensorboard", num_frames=17, max_train_steps=1)
    assert main([str(config)]) == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/reward")] == [1]
    image = events.Images("validation/video_0")[-1].encoded_image_string
    assert image.startswith(b"GIF89a") and image.count(b"\x21\xf9\x04") == 17
    prompt = read_manifest(run / "samples" / "step_000001")[0]["prompt"]
    assert events.SummaryMetadata("validation/video_0").display_name == f"0: {prompt}"


def test_wandb_goes_offline_by_itself_and_never_asks(configured, monkeypatch, caplog):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    config, run = configured("wandb", logger_type="wandb", use_wandb=True, max_train_steps=1)
    monkeypatch.setenv("NETRC", str(run / "none"))
    monkeypatch.setenv("HOME", str(run.parent))
    assert main([str(config)]) == 0
    assert "logged offline" in (run / "log.txt").read_text()
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_dead_tracker_costs_a_warning(configured, monkeypatch):
    import wandb

    def refuse(**kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", refuse)
    config, run = configured("dead", logger_type="wandb", use_wandb=True, max_train_steps=1)
    assert main([str(config)]) == 0
    assert "tracker wandb failed (ConnectionError: no route to host)" in (run / "log.txt").read_text()
    assert len(rows(run / "metrics.csv")) == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_torchrun_agents_on_the_loopback_interface_train_as_one(configured, twin, tmp_path):
    """In float64 and at a large learning rate, so that all that differs is what the nodes do differently."""
    loud = dict(reward_fn={"pick_score": 1000.0}, reward_args={"pick_score": {"model": str(twin / "clip")}})
    keys = dict(max_train_steps=2, train_batch_size=1, lr=1e-2, **loud)
    config, run = configured("nodes", **keys)
    worker = [str(ROOT / "tests" / "rank_worker.py"), str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "Open-Sora")])
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "engine"]
    agents = [subprocess.Popen([*launch, *worker, str(config)], env=environment) for _ in range(2)]
    try:
        assert [agent.wait(900) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    config, alone = configured("alone", **keys | dict(train_batch_size=2))
    subprocess.run([sys.executable, *worker[:1], str(alone), str(config)], env=environment, check=True)
    nodes = [load_file(tmp_path / f"rank_{rank}.safetensors") for rank in range(2)]
    one = load_file(alone / "rank_0.safetensors")
    assert largest_difference(*nodes) == 0 and largest_difference(nodes[0], one) <= 1e-9
    # The outputs start at zero: each step has moved them by about lr.
    assert max(float(value.abs().max()) for key, value in one.items() if "lora_B" in key) > 1e-2
    identity = json.loads((run / "checkpoints" / "step_000002" / "manifest.json").read_text())["config"]
    assert identity["global batch"] == 2


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def test_a_last_save_that_fails_is_not_announced_as_done(twin, tmp_path, monkeypatch, capsys):
    """Exit status 2 and a sentence; the same command then finishes the run."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        assert twin_runs.start(twin, tmp_path / "run", max_train_steps=2) == 2
    told = capsys.readouterr().err
    assert "step 2 could not be saved" in told and "No space left on device" in told
    assert twin_runs.start(twin, tmp_path / "run", max_train_steps=2) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
