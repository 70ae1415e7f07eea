"""The training engine as processes: exact on any number of them, through kills, signals and faults."""

import random
import shutil
import signal
from pathlib import Path

import pytest
from forks import ForkServer
from same_run import adapter, assert_same_run, checkpoint_state, largest_difference, rows
from twins import config_file, settings

DISTURBING = dict(reward_fn=f"{Path(__file__).with_name('disturbing_reward.py')}:Disturbing", reward_args={})
KILLS = 12  # scripts/soak.py is for more


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
        values = settings(twin, run) | dict(num_frames=1, decode_frame=0, val_batch_size=2)
        values["scheduler"]["num_sampling_steps"] = 2
        return config_file(tmp_path / f"{name}.py", values | overrides), run

    return write


def loud(twin: Path) -> dict:
    """A reward whose gradients are far above Adam's epsilon, below which a step would amplify their rounding."""
    return dict(reward_fn={"pick_score": 1000.0}, reward_args={"pick_score": {"model": str(twin / "clip")}})


def test_any_split_of_the_global_batch_gives_the_same_adapter(server, configured, twin):
    """In float64: AdamW takes whole steps along gradients so small that float32 rounds them away."""
    splits = {"one": (1, 4, 1), "accumulated": (1, 1, 4), "two": (2, 2, 1), "four": (4, 1, 1)}
    runs = {}
    for name, (processes, batch, accumulation) in splits.items():
        config, runs[name] = configured(
            name,
            train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **loud(twin),
            max_train_steps=3,
            lr=2e-4,
            lora_dropout=0.2,
            backprop_mode="rand",
            num_frames=5,
            scheduler=dict(type="rflow", num_sampling_steps=2, cfg_scale=3.0),
            decode_frame=-1,
            val_batch_size=1,
        )
        codes, log = server.run(config, processes=processes, IN_FLOAT64="yes")
        assert codes == [0] * processes, log
    # Its outputs start at zero, so they tell that steps were really taken.
    ups = [value for key, value in adapter(runs["one"]).items() if "lora_B" in key]
    assert max(float(value.abs().max()) for value in ups) > 2e-4
    for name in splits:
        assert largest_difference(runs["one"], runs[name]) <= 1e-9, name
        steps = zip(rows(runs["one"] / "metrics.csv"), rows(runs[name] / "metrics.csv"), strict=True)
        for expected, found in steps:
            for column in ("reward", "loss", "grad_norm"):
                assert float(found[column]) == pytest.approx(float(expected[column]), rel=1e-6), column
        assert int(found["step"]) == 3


def test_a_run_killed_at_random_moments_ends_as_if_undisturbed(server, configured):
    keys = dict(
        max_train_steps=6, checkpointing_steps=1, validation_steps=3, keep_checkpoints=1,
        ema_decay=0.9, lora_dropout=0.1, gradient_accumulation_steps=2, train_batch_size=1,
    )  # fmt: skip
    config, undisturbed = configured("undisturbed", **keys)
    codes, log = server.run(config)
    assert codes == [0], log
    dice = random.Random(0)
    kills = 0
    while kills < KILLS:
        config, run = configured(f"victim_{kills}", **keys)
        codes = [-signal.SIGKILL]
        while codes == [-signal.SIGKILL]:
            in_save = kills % 2 == 0
            kill = (
                dict(kill_in_save=dice.randrange(30)) if in_save else dict(kill_after=dice.uniform(0.1, 1.5))
            )
            codes, log = server.run(config, **(kill if kills < KILLS else {}))
            kills += codes == [-signal.SIGKILL]
            assert "damaged" not in log
        assert codes == [0], log
        assert_same_run(undisturbed, run)
        shutil.rmtree(run)


@pytest.mark.parametrize("name, processes", [("SIGTERM", 2), ("SIGINT", 1), ("SIGUSR1", 1)])
def test_a_signal_to_one_process_finishes_the_step_on_all_and_the_run_continues_exactly(
    server, configured, name, processes
):
    keys = dict(**DISTURBING, max_train_steps=3, train_batch_size=1, gradient_accumulation_steps=2)
    keys["keep_checkpoints"] = 1
    config, undisturbed = configured("undisturbed", **keys)
    server.run(config, processes=processes)
    config, run = configured("stopped", **keys)
    # The third reward of a process is in the middle of the second step's accumulation.
    told = dict(SIGNAL=name, SIGNAL_AT="3", SIGNAL_RANK=str(processes - 1))
    codes, log = server.run(config, processes=processes, **told)
    assert codes == [0] * processes, log
    assert f"{name}: finishing the step and saving" in log and "stopped after step 2" in log
    assert [row["step"] for row in rows(run / "metrics.csv")] == ["1", "2"]
    codes, log = server.run(config, processes=processes)
    assert codes == [0] * processes, log
    assert_same_run(undisturbed, run)


def test_a_second_signal_exits_at_once(server, configured):
    config, run = configured("impatient", **DISTURBING, max_train_steps=3)
    codes, log = server.run(config, SIGNAL="SIGTERM", SIGNAL_AT="2", SIGNAL_COUNT="2")
    assert codes == [128 + signal.SIGTERM]
    assert [row["step"] for row in rows(run / "metrics.csv")] == ["1"] and not (run / "checkpoints").exists()


def test_a_reward_that_is_nan_on_one_process_skips_the_step_on_all(server, configured):
    keys = dict(**DISTURBING, max_train_steps=4, train_batch_size=1, seed=3)
    config, run = configured("nan", **keys)
    codes, log = server.run(config, processes=2, NAN_PROMPT="fox")
    assert codes == [0, 0], log
    skipped = [row["skipped"] for row in rows(run / "metrics.csv")]
    assert skipped.count("1.0") == 2 and rows(run / "metrics.csv")[-1]["skipped_steps"] == "2"
    line = next(line for line in log.splitlines() if "was skipped" in line)
    assert "seed 3" in line and "'a red fox runs through snow' (sample" in line and "lora_" in line
    assert line.count("process ") == 1
    assert all(bool(value.isfinite().all()) for value in adapter(run).values())


def test_too_many_bad_steps_in_a_row_stop_the_run_after_a_save(server, configured):
    config, run = configured("bad", **DISTURBING, max_train_steps=9, max_bad_steps=3)
    codes, log = server.run(config, NAN_PROMPT="a")
    assert codes == [2] and "3 steps in a row had no finite reward and gradient" in log
    assert checkpoint_state(run)["step"] == 3


def test_processes_that_hold_different_adapters_are_found_at_the_next_checkpoint(server, configured):
    config, run = configured("diverged", **DISTURBING, max_train_steps=2)
    codes, log = server.run(config, processes=2, DIVERGE_ON_RANK="1")
    assert codes == [2, 2] and "the adapter differs between processes at step 2" in log, log
    assert not list(run.glob("checkpoints/step_*"))
