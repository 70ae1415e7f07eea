"""Accidents on purpose, and whether a run survives them bit for bit: soak.py {soak,races,saves} [--work build/soak].

soak   a long run, killed every 50 to 100 steps and started again, against an undisturbed one; and its memory
races  two or three starts of a run at once, its launcher killed, a worker killed
saves  the disk full, over quota, read-only, or the folder deleted, from each call of the last save on

Trains the tests' small model. A repeated command goes on where it was stopped: each trial that passed is a line of
WORK/<name>.jsonl. Exit status 1 once a trial fails; what it left stays in WORK.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora"), str(ROOT / "tests")]

import twins  # noqa: E402
from disk_faults import FAULTS  # noqa: E402
from forks import ForkServer  # noqa: E402
from same_run import assert_same_training, largest_difference, rows  # noqa: E402

from Core.training.checkpoint import Checkpoints  # noqa: E402
from Core.utils.files import write_whole  # noqa: E402

LAUNCH = ROOT / "Open-Sora" / "script" / "run_text2video_train.sh"
# A reward that can be told to kill its process, at a given one of its calls.
KILLING = {"reward_fn": f"{ROOT / 'tests' / 'disturbing_reward.py'}:Disturbing", "reward_args": {}}
SPACING = (50, 100)  # steps between two kills of the soak
GROWTH = 0.05  # of memory, from a tenth of the steps to the last, that counts as none
PATIENCE = 900  # seconds until a start counts as hanging


@dataclass(frozen=True)
class Bench:
    """Where trials run, and what starts them.

    Attributes:
        twin: folder of the small model.
        work: folder for configs and runs.
    """

    server: ForkServer
    twin: Path
    work: Path

    def config(self, name: str, **overrides) -> tuple[Path, Path]:
        """(config file, run folder) of a run named so, on one process and one frame."""
        run = self.work / name
        values = twins.settings(self.twin, run) | {"num_frames": 1, "decode_frame": 0, "val_batch_size": 2}
        values["num_train_epochs"] = 1 << 20  # steps alone end a run
        values["scheduler"]["num_sampling_steps"] = 2
        return twins.config_file(self.work / f"{name}.py", values | overrides), run

    def finish(self, config: Path, **options) -> str:
        """Run to the end; what it printed."""
        codes, log = self.server.run(config, **options)
        assert not any(codes), log
        return log

    def reference(self, name: str, processes: int = 1, **overrides) -> Path:
        """An undisturbed run, made once."""
        config, run = self.config(name, **overrides)
        if not (run / "adapter").is_dir():
            self.finish(config, processes=processes)
        return run


def soak(bench: Bench, steps: int, spacing: tuple[int, int] = SPACING) -> dict[str, Any]:
    """Kill a run of ``steps`` again and again, in the middle of a step; its kills."""
    keys = {
        **KILLING,
        "max_train_steps": steps,
        "checkpointing_steps": max(1, spacing[0] // 5),
        "ema_decay": 0.9,
    }
    keys |= {"train_batch_size": 1, "validation_steps": steps}
    undisturbed = bench.reference("undisturbed", **keys)
    config, run = bench.config("killed", **keys)
    dice, kills = random.Random(0), 0
    while True:
        after = dice.randint(*spacing)
        codes, log = bench.server.run(config, SIGNAL="SIGKILL", SIGNAL_AT=str(after))
        assert "Traceback" not in log, log
        if codes == [0]:
            break
        assert codes == [-signal.SIGKILL], log
        kills += 1
    assert_same_training(undisturbed, run)
    return {"steps": len(rows(run / "metrics.csv")), "kills": kills, "bit-identical": True}


def memory(bench: Bench, steps: int) -> dict[str, Any]:
    """Resident memory, in MB, of one process after a tenth of its steps and at the end."""
    config, run = bench.config(
        "memory", **KILLING, train_batch_size=1, max_train_steps=steps, validation_steps=steps
    )
    shutil.rmtree(run, ignore_errors=True)
    process = start(config)
    seen: dict[int, float] = {}
    while process.poll() is None:
        if done := steps_done(run):
            seen[done] = resident(process.pid) or seen.get(done, 0.0)
        time.sleep(0.2)
    assert process.returncode == 0, process.communicate()[0]
    early = min(step for step in seen if step >= steps // 10)
    last = max(step for step, size in seen.items() if size and step < steps)
    assert seen[last] < seen[early] * (1 + GROWTH), f"memory grew from {seen[early]} to {seen[last]} MB"
    return {"steps": steps, f"MB at step {early}": seen[early], f"MB at step {last}": seen[last]}


def resident(pid: int) -> float:
    """MB of a process; 0 where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def steps_done(run: Path) -> int:
    try:
        return len(rows(run / "metrics.csv"))
    except OSError:
        return 0


def race(bench: Bench, number: int, starts: int, processes: int = 1) -> dict[str, Any]:
    """Start one run ``starts`` times at once: one trains, the others are refused and told who does."""
    keys = {"max_train_steps": 4, "train_batch_size": 2 // processes}
    undisturbed = bench.reference(f"alone_{processes}", processes, **keys)
    config, run = bench.config(f"race_{number}", **keys)
    options = {"starts": starts, "processes": processes}
    codes, log = bench.server.run(config, **options, IMPATIENT="yes")
    by_start = [codes[first : first + processes] for first in range(0, len(codes), processes)]
    assert sorted(by_start) == [[0] * processes, *[[2] * processes] * (starts - 1)], log
    assert log.count("is in use by process") == starts - 1, log
    assert_same_training(undisturbed, run)
    return {"starts": starts, "processes": processes, "trained": 1}


def start(config: Path, processes: int = 1) -> subprocess.Popen:
    """The training command as a user gives it."""
    environment = os.environ | {
        "NUM_PROCESSES": str(processes),
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
    }
    command = ["sh", str(LAUNCH), str(config)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_in_launch(bench: Bench, number: int, victim: str) -> dict[str, Any]:
    """Kill the launcher of two processes, or a worker of it, while they train; the same command then goes on.

    Args:
        victim: ``launcher`` or ``worker``.
    """
    keys = {"max_train_steps": 60, "checkpointing_steps": 5, "train_batch_size": 1}
    name = "undisturbed_launch"
    config, undisturbed = bench.config(name, **keys)
    if not (undisturbed / "adapter").is_dir():
        wait(start(config, processes=2), expected=0)
    config, run = bench.config(f"{victim}_{number}", **keys)
    launcher = start(config, processes=2)
    while steps_done(run) < 8 + number % 5:
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.05)
    workers = children(launcher.pid)
    os.kill(launcher.pid if victim == "launcher" else workers[number % len(workers)], signal.SIGKILL)
    if victim == "worker":
        assert launcher.wait(PATIENCE) != 0
    stopped = steps_done(run)
    wait(start(config, processes=2), expected=0)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers), "a worker outlived its launcher"
    assert_same_training(undisturbed, run)
    return {"killed": victim, "after step": stopped, "bit-identical": True}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait(process: subprocess.Popen, expected: int) -> None:
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == expected, output


def fail_save(bench: Bench, fault: str, number: int) -> dict[str, Any]:
    """Let the disk fail from one call of the last save on: no success without an adapter, and the command repeats.

    Returns:
        Where the fault came; without ``call`` if the save makes fewer calls.
    """
    keys = {"max_train_steps": 2, "checkpointing_steps": 1, "ema_decay": 0.9}
    undisturbed = bench.reference("saved", **keys)
    begun = half_way(bench, **keys)
    config, run = bench.config(f"{fault}_{number}", **keys)
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(begun, run)
    codes, log = bench.server.run(config, FAULT=f"{fault}@{number}")
    assert "Traceback" not in log, log
    if codes == [0]:
        assert largest_difference(undisturbed, run) == 0
    else:
        assert codes == [2] and "step 2 could not be saved" in log, log
    come = [line.rpartition("at ")[2] for line in log.splitlines() if "the fault came at" in line]
    log = bench.finish(config)
    assert "Traceback" not in log, log
    assert_same_training(undisturbed, run)
    shutil.rmtree(run)
    return {"fault": fault, "number": number, "exit": codes[0]} | (
        {"call": come[0]} if come != ["[]"] else {}
    )


def half_way(bench: Bench, **keys) -> Path:
    """A run whose second and last step was not saved."""
    config, run = bench.config("half_way", **keys)
    if not run.is_dir():
        bench.finish(config)
        first, last = Checkpoints(run / "checkpoints", 2).all()
        shutil.rmtree(last.folder)
        shutil.rmtree(run / "adapter")
        shutil.copytree(first.adapter, run / "adapter")
    return run


def save_trials(bench: Bench, done: list[dict]) -> Iterator[dict]:
    for fault in FAULTS:
        for number in itertools.count():
            known = [trial for trial in done if (trial["fault"], trial["number"]) == (fault, number)]
            trial = known[0] if known else fail_save(bench, fault, number)
            if not known:
                yield trial
            if "call" not in trial:
                break


def race_trials(bench: Bench, done: list[dict], count: int) -> Iterator[dict]:
    kinds = ("two", "three", "launcher", "worker")
    for number in range(len(done), count):
        kind = kinds[number % len(kinds)]
        if kind in ("two", "three"):
            yield race(bench, number, starts=2 + (kind == "three"), processes=1 + number // 4 % 2)
        else:
            yield kill_in_launch(bench, number, kind)


def soak_trials(bench: Bench, done: list[dict], steps: int) -> Iterator[dict]:
    trials = (soak, memory)
    for trial in trials[len(done) :]:
        yield trial(bench, steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("soak", "races", "saves"))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "soak")
    parser.add_argument("--steps", type=int, default=1000, help="of the soak (default 1000)")
    parser.add_argument("--races", type=int, default=20, help="how many (default 20)")
    args = parser.parse_args()
    work = args.work.resolve() / args.what
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "twin" / "prompts.txt").is_file():
        twins.save_twin(work / "twin")
    results = work.with_suffix(".jsonl")
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    bench = Bench(ForkServer(), work / "twin", work)
    trials = {
        "soak": lambda: soak_trials(bench, done, args.steps),
        "races": lambda: race_trials(bench, done, args.races),
        "saves": lambda: save_trials(bench, done),
    }
    for trial in trials[args.what]():
        done.append(trial)
        write_whole(results, "".join(json.dumps(trial) + "\n" for trial in done))
        print(json.dumps(trial), flush=True)
    bench.server.close()
    print(f"{len(done)} trials of {args.what} passed, listed in {results}")


if __name__ == "__main__":
    main()
