"""What a GPU alone shows: kernels, waiting, dtypes, memory that runs out, kills, two processes on one card.

Elsewhere they are skipped. VADER_CUDA_TESTS_ON_CPU=1 runs on a CPU those that can run there, to try them out.
"""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import twin_runs
from same_run import adapter, checkpoint_state, largest_difference
from torch import nn
from twins import config_file, settings

from Core.modules import offloading
from scripts.bench.bench import Bench
from scripts.bench.presets import Setting
from scripts.gpu.checks import ON_CPU

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not (ON_GPU or os.environ.get(ON_CPU)), reason="there is no GPU")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="a CPU has nothing of the kind")
WORKER = Path(__file__).with_name("cuda_worker.py")
SHORT = dict(decode_frame=0, val_batch_size=1)


def metrics(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


SMALL = {
    "cpu-twin": "default;image_size=(32,32);num_frames=17;scheduler.num_sampling_steps={}",
    "wan-twin": "default;num_sampling_steps={}",
}


def small_bench(folder: Path, preset: str = "cpu-twin", steps: int = 4, change: str = "") -> Bench:
    torch.manual_seed(0)  # of the random weights
    bench = Bench(preset, Setting.parse(SMALL[preset].format(steps) + change), folder / "run")
    bench.step()
    return bench


@needs_gpu
def test_attention_takes_a_fused_kernel():
    """With the math kernel forbidden there is nothing to fall back to."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k = (torch.randn(2, 16, n, 72, device="cuda", dtype=torch.bfloat16) for n in (391, 300))
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool, device="cuda")
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(fused):
        nn.functional.scaled_dot_product_attention(q, q, q)
        nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask)


@needs_gpu
@pytest.mark.parametrize("preset", SMALL)
def test_a_whole_step_takes_fused_kernels(tmp_path, preset):
    """Forward and backward, in every network, under the same ban."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    bench = small_bench(tmp_path, preset)
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(fused):
        bench.step()


@needs_gpu
@pytest.mark.parametrize("preset", SMALL)
def test_the_sampling_loop_waits_for_no_gpu(tmp_path, preset):
    bench = small_bench(tmp_path, preset)
    trainer, backbone = bench.trainer, bench.trainer.backbone
    rollout = trainer.objective.rollout
    predict = backbone.predictor(rollout.features(trainer.prompts_of([0])))
    z, timesteps = rollout.noise([0]), backbone.timesteps(1)
    with torch.no_grad(), trainer.distributed.autocast(), backbone.no_grad_steps():
        predict(z, timesteps[0])  # the captions' keys and values, once for each sample
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in timesteps:
                predict(z, t)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("objective", ["reward_gradient", "leap"])
@pytest.mark.parametrize("preset", SMALL)
def test_a_step_waits_as_often_however_many_sampling_steps_it_has(
    tmp_path, record_property, preset, objective
):
    change = f";objective={objective}"
    counts = {steps: waits(small_bench(tmp_path / str(steps), preset, steps, change)) for steps in (4, 8)}
    record_property("waits_in_a_step", counts[4])
    assert counts[4] == counts[8]


def waits(bench: Bench) -> int:
    """How often the host waits for the GPU in an optimiser step."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bench.trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@pytest.fixture(scope="module")
def exact(twin, tmp_path_factory) -> list[dict[str, float]]:
    """Metrics of a run in float32."""
    run = tmp_path_factory.mktemp("exact") / "run"
    assert twin_runs.start(twin, run, **SHORT) == 0
    return metrics(run)


# Keys, and the largest relative error of the reward.
DTYPES = {
    "bf16": (dict(dtype="bf16", mixed_precision="bf16"), 0.1),
    "fp16": (dict(dtype="fp16", mixed_precision="fp16"), 0.1),
    "fp8": (dict(dtype="fp8", mixed_precision="bf16"), 0.2),
    "nf4": (dict(dtype="bf16", base_quant="nf4", mixed_precision="bf16"), 0.2),
}


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_trains_near_float32(twin, tmp_path, exact, record_property, name):
    if name == "nf4":
        pytest.importorskip("bitsandbytes")
    run = tmp_path / "run"
    keys, bound = DTYPES[name]
    rows = trained(twin, run, exact, record_property, bound, **keys)
    # fp16's scaler may skip steps until it has found its scale.
    assert name == "fp16" or not any(row["skipped_steps"] for row in rows)
    if name == "fp16" and ON_GPU:
        assert checkpoint_state(run)["scaler"]["scale"] > 0


def trained(
    twin: Path, run: Path, exact: list[dict[str, float]], record_property, bound: float, **keys
) -> list[dict[str, float]]:
    """Metrics of a run whose first reward, before any step was taken, is close to float32's."""
    assert twin_runs.start(twin, run, **SHORT, **keys) == 0
    rows = metrics(run)
    error = abs(rows[0]["reward"] - exact[0]["reward"]) / abs(exact[0]["reward"])
    record_property("reward_error", error)
    assert len(rows) == len(exact) and error < bound
    return rows


@pytest.mark.parametrize("preset", SMALL)
def test_streamed_blocks_train_as_those_that_stay(tmp_path, record_property, preset):
    """In the second step the order of blocks is known, and each is on its way before it is entered."""
    losses, norms = [], []
    for change in ("", ";stream_blocks=True"):
        bench = small_bench(tmp_path / f"run{change}", preset, change=change)
        metrics = bench.trainer.train_step()
        losses.append(metrics.loss)
        norms.append(metrics.grad_norm)
    for name, (there, streamed) in {"loss": losses, "gradient": norms}.items():
        record_property(f"{name}_difference", abs(streamed - there) / abs(there))
        assert streamed == pytest.approx(there, rel=1e-3)


@needs_gpu
def test_activations_in_the_cpus_memory_train_as_those_that_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(offloading, "SMALL", 1)
    copies, copy = [], offloading.copy_pieces
    monkeypatch.setattr(offloading, "copy_pieces", lambda *args: copies.append(copy(*args)))
    found = []
    for offloaded in (False, True):
        change = f";activation_offloading={offloaded}"
        found.append(small_bench(tmp_path / change, "wan-twin", change=change).trainer.train_step())
        assert bool(copies) == offloaded
    there, back = found
    assert back.loss == pytest.approx(there.loss, rel=1e-3)
    assert back.grad_norm == pytest.approx(there.grad_norm, rel=1e-3)


@needs_gpu
def test_advice_is_given_when_memory_runs_out(twin, tmp_path, capsys):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 96 * 2**20) / total)
    try:
        code = twin_runs.start(twin, tmp_path / "run", num_frames=51, image_size=(1024, 1024))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert code == 3
    said = capsys.readouterr().err
    assert "the device's memory is too small for this run, which tried to allocate" in said
    assert "train_batch_size=1" in said


def run_config(twin: Path, folder: Path, name: str, **overrides) -> tuple[Path, Path]:
    """Config and folder of a run, with a reward whose gradients are far above Adam's epsilon."""
    loud = dict(reward_fn={"pick_score": 1000.0}, reward_args={"pick_score": {"model": str(twin / "clip")}})
    values = settings(twin, folder / name) | SHORT | loud | {"checkpointing_steps": 1} | overrides
    return config_file(folder / f"{name}.py", values), folder / name


def start(config: Path, **variables: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(WORKER), str(config)], env=os.environ | variables)


@pytest.fixture(scope="module")
def undisturbed(twin, tmp_path_factory) -> Path:
    """Folder of a run of one process."""
    config, run = run_config(twin, tmp_path_factory.mktemp("undisturbed"), "run")
    assert start(config).wait() == 0
    return run


def relative_difference(a: Path, b: Path) -> float:
    return largest_difference(a, b) / max(float(v.abs().max()) for v in adapter(b).values())


def test_a_killed_run_ends_as_an_undisturbed_one(twin, tmp_path, undisturbed, record_property):
    """A GPU adds up in no fixed order, so that two runs need not agree to the last bit."""
    config, run = run_config(twin, tmp_path, "killed")
    kill_after_a_step(start(config), run)
    assert start(config).wait() == 0
    assert len(metrics(run)) == len(metrics(undisturbed))
    difference = relative_difference(run, undisturbed)
    record_property("relative_difference", difference)
    assert difference < 0.02


def kill_after_a_step(process: subprocess.Popen, run: Path) -> None:
    while process.poll() is None and not (run / "checkpoints" / "step_000001").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_two_processes_on_one_card_give_the_adapter_of_one(
    twin, tmp_path, undisturbed, record_property, split
):
    """Each is told to be the first process of a machine: accelerate gives those of one machine a card each."""
    config, run = run_config(twin, tmp_path, "two", train_batch_size=1, shard_frozen=split)
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = str(found.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    processes = [start(config, RANK=rank, **shared) for rank in ("0", "1")]
    assert [process.wait() for process in processes] == [0, 0]
    difference = relative_difference(run, undisturbed)
    record_property("relative_difference", difference)
    assert difference < 0.02


def test_compiled_blocks_train_near_float32(twin, tmp_path, exact, record_property):
    trained(twin, tmp_path / "run", exact, record_property, 0.01, compile_blocks=True)
