"""Objectives in whole runs: splits, resuming, groups with a fault, and what is refused before anything loads."""

import shutil
from pathlib import Path

import pytest
import torch
import twin_runs
from forks import ForkServer
from safetensors.torch import load_file
from test_objectives import TIMER, assert_same, gradient
from twin_runs import SIZE
from twins import config_file, settings

from Core.modules import lora
from Core.training.checkpoint import Checkpoints
from Core.training.objectives.group import Comparison, group_advantages
from Core.utils.tables import read_table

DISTURBING = f"{Path(__file__).with_name('disturbing_reward.py')}:Disturbing"
OWN_KEYS: dict[str, dict] = {
    "leap": {},
    "drtune": dict(grad_steps=1, early_stop_steps=1),
    "direct_align": {},
    "grpo": dict(group_size=4, inner_epochs=2, kl_weight=0.1, clip_range=0.1, trajectory_device="cpu"),
    "nft": dict(group_size=4, inner_epochs=2, kl_weight=0.1, levels_per_video=2),
    "dpo": dict(group_size=4, inner_epochs=2),
}
STEPS = dict(scheduler=dict(type="rflow", num_sampling_steps=2, cfg_scale=3.0), num_frames=1, decode_frame=0)


def keys_of(objective: str, **overrides) -> dict:
    return dict(objective=objective, **STEPS, **OWN_KEYS[objective]) | overrides


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / lora.WEIGHTS)


@pytest.mark.parametrize("objective", OWN_KEYS)
def test_a_steps_gradient_does_not_depend_on_its_batches(double_trainer, objective):
    trainer = double_trainer(**keys_of(objective, train_batch_size=4))
    found = []
    for batches in ([range(0, 4)], [range(0, 1), range(1, 4)]):
        trainer.objective.begin_step(0)
        named = [(trainer.prompts_of(samples), samples) for samples in batches]
        trainer.objective.collect(named, trainer.distributed.gather, TIMER)
        trainer.objective.begin_update(0)
        found.append(
            sum(
                gradient(trainer, term.loss.sum())
                for prompts, samples in named
                for term in trainer.objective.losses(prompts, samples, TIMER)
            )
        )
    assert_same(*found)


@pytest.fixture(scope="module")
def server():
    server = ForkServer()
    yield server
    server.close()


@pytest.mark.parametrize(("objective", "names"), [("grpo", ("one", "two", "four")), ("dpo", ("one", "two"))])
def test_groups_may_be_split_over_processes(server, twin, tmp_path, objective, names):
    """A group of four; of the two ways to gather, rewards alone and with latents, each has its objective."""
    splits = {"one": (1, 4, 1), "two": (2, 1, 2), "four": (4, 1, 1)}
    runs = {}
    for name in names:
        processes, batch, accumulation = splits[name]
        runs[name] = tmp_path / name
        keys = keys_of(objective, train_batch_size=batch, gradient_accumulation_steps=accumulation)
        keys |= dict(
            reward_fn={"pick_score": 1000.0}, reward_args={"pick_score": {"model": str(twin / "clip")}}
        )
        keys |= dict(max_train_steps=1, val_batch_size=1, lora_dropout=0.2, image_size=SIZE)
        config = config_file(tmp_path / f"{name}.py", settings(twin, runs[name], **keys))
        codes, log = server.run(config, processes=processes, IN_FLOAT64="yes")
        assert codes == [0] * processes, log
    one = adapter(runs["one"])
    assert max(float(value.abs().max()) for key, value in one.items() if "lora_B" in key) > 1e-4
    for run in runs.values():
        assert all((value - one[key]).abs().max() <= 1e-9 for key, value in adapter(run).items())


@pytest.mark.parametrize("objective", OWN_KEYS)
def test_a_run_of_any_objective_continues_bit_for_bit(twin, tmp_path, objective):
    keys = keys_of(objective, max_train_steps=2, checkpointing_steps=1, train_batch_size=4, image_size=SIZE)
    run, found = tmp_path / "run", []
    for _ in range(2):
        assert twin_runs.start(twin, run, **keys, num_val_runs=1, val_batch_size=1) == 0
        newest = Checkpoints(run / "checkpoints", 2).newest()
        found.append(((run / "adapter" / lora.WEIGHTS).read_bytes(), newest.state()))
        shutil.rmtree(newest.folder)
    (first, before), (second, after) = found
    assert first == second and before["step"] == after["step"] == 2
    kept = [state["objective"].get("policy", {}).get("average", {}) for state in (before, after)]
    assert bool(kept[0]) == (objective == "nft")
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


def test_advantages_are_relative_to_the_group():
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0, 2.0, torch.nan], dtype=torch.float64)
    found, sound = group_advantages(rewards, 2)
    torch.testing.assert_close(found[:2], torch.tensor([-1.0, 1.0], dtype=torch.float64) / (1 + 1e-4))
    assert found[2:].tolist() == [0.0] * 4 and sound.tolist() == [True] * 4 + [False] * 2
    outlier = torch.zeros(64, dtype=torch.float64)
    outlier[7] = 1.0
    assert group_advantages(outlier, 64)[0].max() == 5


def test_a_group_that_is_left_out_does_not_disturb_what_is_logged():
    values = torch.tensor([[9.0, 1.0], [3.0, 3.0], [7.0, torch.inf], [5.0, 2.0]])
    values[2, 0] = torch.nan
    compared = Comparison.of(torch.tensor([13, 10, 12, 11]), values, 2)
    assert compared.rewards[:2].tolist() == [3.0, 5.0] and compared.skipped_groups == 1
    assert compared.logged.tolist() == [[3.0], [2.0], [2.5], [2.5]]
    assert compared.spread.tolist() == [1.0, 1.0, 0.0, 0.0]


def refused(twin, tmp_path, capsys, **keys) -> str:
    assert twin_runs.start(twin, tmp_path / "run", **keys) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (dict(objective="grpo", group_size=3), "group_size=3 does not divide the global batch of 4"),
        (dict(objective="nft", group_size=1), "group_size must be at least 2, got 1"),
        (dict(objective="dpo", decode_frame=9), "decode_frame 9 is out of range"),
        (
            dict(objective="drtune", grad_steps=3, early_stop_steps=1),
            "must be at most the 2 sampling steps, got 4",
        ),
        (dict(objective="grpo", grad_steps=4), "grad_steps must be at most the 2 sampling steps, got 4"),
        (
            dict(objective="leap", reward_fn="command", reward_args=dict(command="true")),
            "reward 'command' has no gradient with respect to the frames; set objective to 'nft', 'dpo'",
        ),
        (
            dict(objective="grpo", reward_fn="command", reward_args=dict(command="no_such")),
            "no program 'no_such'",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_loads(
    twin, tmp_path, capsys, monkeypatch, keys, sentence
):
    monkeypatch.setattr("Core.training.setup.build_backbone", lambda *_: pytest.fail("loaded"))
    assert sentence in refused(twin, tmp_path, capsys, **STEPS | dict(train_batch_size=4) | keys)


@pytest.mark.parametrize(("processes", "code"), [(1, 2), (3, 0)])
def test_check_only_knows_the_groups_of_as_many_processes(twin, tmp_path, capsys, processes, code):
    keys = STEPS | dict(objective="grpo", group_size=3, train_batch_size=2)
    assert twin_runs.start(twin, tmp_path / "run", "--check-only", str(processes), **keys) == code
    assert ("group_size=3 does not divide the global batch of 2" in capsys.readouterr().err) == (code == 2)


def test_a_reward_file_without_a_gradient_is_refused_by_gradient_objectives_alone(twin, tmp_path, capsys):
    file = tmp_path / "numbers.py"
    file.write_text(
        "import torch\n"
        "from Core.rewards import ImageReward, RewardInfo\n"
        "class Numbers(ImageReward):\n"
        "    info = RewardInfo(name='numbers', summary='brightness', range='0 to 1')\n"
        "    @torch.no_grad()\n"
        "    def score_images(self, images, prompts):\n"
        "        return [float(image.mean()) for image in images]\n"
    )
    keys = STEPS | dict(reward_fn=f"{file}:Numbers", reward_args={}, max_train_steps=1, val_batch_size=1)
    sentence = "has no gradient with respect to the frames; set objective to 'nft', 'dpo'"
    assert sentence in refused(twin, tmp_path, capsys, **keys)
    assert twin_runs.start(twin, tmp_path / "free", **keys, objective="grpo", group_size=2) == 0
    (row,) = read_table(tmp_path / "free" / "metrics.csv")
    assert row["reward"] == row["numbers"] and row["reward_spread"] > 0 and row["ratio"] == 1


def test_a_nan_in_one_group_leaves_that_group_out(twin, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NAN_PROMPT", "fox")
    keys = keys_of("grpo", group_size=2, train_batch_size=8, max_train_steps=1, val_batch_size=1)
    keys |= dict(reward_fn=DISTURBING, reward_args={})
    assert twin_runs.start(twin, tmp_path / "run", **keys) == 0
    (row,) = read_table(tmp_path / "run" / "metrics.csv")
    assert (row["skipped_groups"], row["skipped"]) == (1, 0) and 0 < row["reward"] < 1
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("step 1 leaves out the group of 'a red fox runs through snow'") == 2
    assert all(bool(value.isfinite().all()) for value in adapter(tmp_path / "run").values())


def test_a_step_without_any_sound_group_is_skipped(twin, tmp_path, monkeypatch):
    monkeypatch.setenv("NAN_PROMPT", "a")
    keys = keys_of("nft", group_size=2, max_train_steps=1, val_batch_size=1)
    assert twin_runs.start(twin, tmp_path / "run", **keys, reward_fn=DISTURBING, reward_args={}) == 0
    (row,) = read_table(tmp_path / "run" / "metrics.csv")
    assert (row["skipped_groups"], row["skipped"]) == (1, 1)
