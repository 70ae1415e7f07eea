"""Frozen networks split over processes: the same runs as with whole ones, through kills and changes of their number."""

import signal
from pathlib import Path

import pytest
import torch
from forks import ForkServer
from pipelines import save_wan
from pipelines_cogvideox import save_cogvideox
from pipelines_hunyuan import save_hunyuan
from pipelines_ltx import save_ltx
from pipelines_modelscope import save_modelscope
from safetensors.torch import save_file
from same_run import assert_same_training, checkpoint_state, largest_difference, rows
from sampling_runs import contents
from torch import nn
from twins import PROMPTS, config_file, settings

from Core.modules import sharding
from Core.utils.exit_codes import LOST_PROCESS

KEYS = dict(
    num_frames=1, decode_frame=0, val_batch_size=3, train_batch_size=1, gradient_accumulation_steps=2, lr=2e-4,
    max_train_steps=2, validation_steps=100, checkpointing_steps=1,
    scheduler=dict(type="rflow", num_sampling_steps=2, cfg_scale=3.0),
)  # fmt: skip
FAMILIES = {
    "wan": lambda folder: save_wan(folder, "ti2v"),
    "hunyuan_video15": save_hunyuan,
    "ltx": save_ltx,
    "cogvideox": save_cogvideox,
    "modelscope": save_modelscope,
}


@pytest.fixture(scope="module")
def server():
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def configured(twin, tmp_path):
    """A function that writes the config of a run named so, with keys overridden."""

    def write(name: str, **overrides) -> tuple[Path, Path]:
        run = tmp_path / name
        # Its gradients are far above Adam's epsilon, below which a step would amplify their rounding.
        reward = dict(
            reward_fn={"pick_score": 1000.0}, reward_args={"pick_score": {"model": str(twin / "clip")}}
        )
        return config_file(tmp_path / f"{name}.py", settings(twin, run) | reward | KEYS | overrides), run

    return write


@pytest.fixture
def trained(server, configured):
    """A function that trains a run named so, and returns its exit codes, what it printed, and its folder."""

    def train(name: str, *flags: str, processes: int = 2, sharded: bool = False, **env):
        config, run = configured(name, shard_frozen=sharded)
        return *server.run(config, *flags, processes=processes, call="sharded_calls:train", **env), run

    return train


def test_a_sharded_run_is_that_of_whole_networks_and_outlives_a_killed_process(trained):
    """Three validation prompts on two processes: one of them samples and scores a video that does not count."""
    runs = {}
    for name in ("whole", "sharded"):
        codes, log, runs[name] = trained(name, sharded=name == "sharded")
        assert codes == [0, 0], log
    assert largest_difference(runs["whole"], runs["sharded"]) <= 1e-6
    # The stand-in makes a larger batch, whose rounding is another.
    means = [[float(row["reward"]) for row in rows(run / "validation.csv")] for run in runs.values()]
    assert len(means[0]) == 2 and means[1] == pytest.approx(means[0], rel=1e-6)

    kill = dict(KILLED_RANK="1", KILLED_IN_BACKWARD="4")  # in the second step
    codes, log, killed = trained("killed", sharded=True, **kill)
    assert codes == [4, -signal.SIGKILL] and log.count(LOST_PROCESS) == 1 and "Traceback" not in log, log
    assert checkpoint_state(killed)["step"] == 1
    codes, log, _ = trained("killed", sharded=True)
    assert codes == [0, 0], log
    assert_same_training(runs["sharded"], killed)


def test_a_sharded_run_goes_on_with_other_processes_and_with_whole_networks(trained):
    """In float64: AdamW takes whole steps along gradients so small that float32 rounds them away."""
    legs = [(2, 2, True), (4, 1, True), (1, 4, False)]
    for step, (processes, accumulation, sharded) in enumerate(legs, 1):
        flags = ["--max-train-steps", str(step), "--gradient-accumulation-steps", str(accumulation)]
        codes, log, moved = trained("moved", *flags, processes=processes, sharded=sharded, IN_FLOAT64="yes")
        assert codes == [0] * processes, log
    flags = ["--max-train-steps", "3", "--gradient-accumulation-steps", "4"]
    codes, log, whole = trained("whole", *flags, processes=1, IN_FLOAT64="yes")
    assert codes == [0], log
    assert largest_difference(whole, moved) <= 1e-7


def test_sharded_processes_make_the_same_videos_even_if_one_fails(server, configured):
    keys = dict(is_vader_training=False, prompt=PROMPTS[:3], val_batch_size=2, num_frames=5)
    made = {}
    for name in ("whole", "sharded"):
        config, run = configured(name, shard_frozen=name == "sharded", **keys)
        codes, log = server.run(config, processes=2, call="sharded_calls:with_a_faulty_prompt")
        assert codes == [1, 1] and "its picture cannot be read" in log and "1 of 3 videos" in log, log
        made[name] = contents(run)
    assert made["whole"] == made["sharded"] and len(made["whole"]) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_denoiser_computes_what_a_whole_one_does(server, tmp_path, family):
    folder = FAMILIES[family](tmp_path / "pipeline")
    codes, log = server.run(folder, family, processes=2, call="sharded_calls:compare_family")
    assert codes == [0, 0], log


def test_one_process_has_nothing_to_split_over(trained):
    codes, log, run = trained("alone", processes=1, sharded=True)
    assert codes == [2] and "start several, or set stream_blocks=True" in log and not run.exists()


def test_weights_of_another_network_are_named_before_any_is_read(tmp_path):
    with sharding.parameters_on_meta():
        network = nn.Linear(3, 2)
    assert all(parameter.is_meta for parameter in network.parameters())
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2, 4)}, file)
    with pytest.raises(ValueError, match=r"1 missing: bias; 1 of another shape: weight \(2, 4\)"):
        sharding.fill(network, [file], torch.device("cpu"))


def test_experts_that_only_one_process_asks_run_on_all(server, tmp_path):
    folder = save_wan(tmp_path / "pipeline", "a14b")
    codes, log = server.run(folder, processes=2, call="sharded_calls:compare_experts")
    assert codes == [0, 0], log


def test_a_split_language_model_scores_as_a_whole_one(server, tmp_path):
    codes, log = server.run(tmp_path / "rewards", processes=2, call="sharded_calls:compare_rewards")
    assert codes == [0, 0], log
