"""Sampling on several processes, and killed in the middle."""

import pytest
import twins
from forks import ForkServer
from sampling_runs import SCHEDULER, contents, entries

from Core.generation.manifest import PARTIAL


@pytest.fixture(scope="module")
def forks():
    server = ForkServer()
    yield server
    server.close()


def config(twin, folder, **overrides):
    values = twins.settings(
        twin, folder, is_vader_training=False, scheduler=SCHEDULER, verbose=1, **overrides
    )
    return twins.config_file(folder.with_suffix(".config.py"), values)


def test_processes_share_the_work_and_change_no_byte(twin, tmp_path, forks):
    made = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        codes, log = forks.run(config(twin, folder, end_index=3), processes=processes)
        assert codes == [0] * processes, log
        assert f"3 videos are in {folder}" in log
        made[processes] = contents(folder)
    assert made[1] == made[2] and len(made[1]) == 3
    assert list(entries(tmp_path / "2")) == sorted(entries(tmp_path / "2"))


def test_a_killed_run_continues_and_makes_nothing_twice(twin, tmp_path, forks):
    """Killed at any moment: what was there stays untouched, what was half written goes."""
    folder = tmp_path / "run"
    file = config(twin, folder, num_sample=8, end_index=2)
    survivors, rounds = {}, 0
    while len(contents(folder)) < 16 and rounds < 40:
        forks.run(file, kill_after=1.0 + 0.7 * rounds)
        rounds += 1
        for name, before in survivors.items():
            assert (folder / name).stat().st_mtime_ns == before, f"{name} was made twice"
        survivors = {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*.mp4")}
    (folder / f"{PARTIAL}0000_0_half.mp4").write_bytes(b"half")
    codes, log = forks.run(file)
    assert codes == [0], log
    assert len(entries(folder)) == 16
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    whole = tmp_path / "whole"
    assert forks.run(config(twin, whole, num_sample=8, end_index=2))[0] == [0]
    assert contents(whole) == contents(folder)
