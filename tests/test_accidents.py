"""Accidents of a run's folder and its processes: each costs steps at most, never a mixed, lost or false result."""

import errno
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import twin_runs
from disk_faults import DELETED, FAULTS, failing_disk
from forks import ForkServer
from safetensors.torch import load_file
from torch import nn

from Core.modules import lora
from Core.training import setup
from Core.training.checkpoint import Checkpoints
from Core.utils import folder_lock
from Core.utils.environment import read_starts
from scripts import soak

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def said(caplog, monkeypatch):
    """What was logged as a warning, once called."""
    monkeypatch.setattr(logging.getLogger("vader"), "propagate", True)
    return lambda: caplog.text


@pytest.fixture(scope="module")
def bench(twin, tmp_path_factory):
    server = ForkServer()
    yield soak.Bench(server, twin, tmp_path_factory.mktemp("bench"))
    server.close()


def python(code: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **options)


# One run a folder


def test_a_folder_in_use_is_refused_and_its_owner_named(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.0)
    with folder_lock.folder_lock(tmp_path):
        with pytest.raises(BlockingIOError, match=rf"in use by process {os.getpid()} on \S+, since 20"):
            with folder_lock.folder_lock(tmp_path):
                pass
    with folder_lock.folder_lock(tmp_path):
        pass


def test_the_lock_dies_with_its_owner_however_it_dies(tmp_path):
    hold = "import sys, time; from pathlib import Path; from Core.utils.folder_lock import folder_lock\n"
    hold += "with folder_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    owner = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout.readline() == "held\n"
    owner.kill()
    with folder_lock.folder_lock(tmp_path):  # it waits for an owner that is ending
        pass
    owner.communicate()


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, said):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with folder_lock.folder_lock(tmp_path):
        assert "has no locks" in said()


def test_of_several_starts_one_trains_and_the_others_are_refused(bench):
    soak.race(bench, 0, starts=3)


@pytest.mark.parametrize("launched", [True, False])
def test_a_worker_ends_with_its_launcher_and_a_plain_start_outlives_its_shell(launched, tmp_path):
    alive = tmp_path / "alive"
    worker = "from Core.utils.process import end_with_launcher; end_with_launcher()\n"
    worker += f"import time\nwhile True:\n    open({str(alive)!r}, 'a').write('.'); time.sleep(0.02)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    environment |= {"TORCHELASTIC_RUN_ID": "none"} if launched else {}
    process = python(launcher, env=environment)
    while not alive.exists():
        time.sleep(0.02)
    (child,) = soak.children(process.pid)
    process.kill()
    process.wait()
    time.sleep(0.1)
    size = alive.stat().st_size
    time.sleep(0.3)
    grown = alive.stat().st_size > size
    if grown:
        os.kill(child, signal.SIGKILL)
    assert grown is not launched


# Saving


def small_model(seed: int):
    return lora.attach(nn.Sequential(nn.Linear(4, 4)), ["0"], rank=2, alpha=2, seed=seed)


@pytest.mark.parametrize("lasting", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_save_that_fails_anywhere_leaves_something_whole(tmp_path, fault, lasting):
    """After every call that writes: the old adapter and checkpoint, or the new ones, and never neither."""
    old, new = small_model(0), small_model(1)
    expected = {key: p.detach() for key, p in lora.parameters(new).items()}
    for number in range(100):
        run = tmp_path / str(number)
        checkpoints = Checkpoints(run / "checkpoints", keep=1)
        lora.save(old, run / "adapter")
        checkpoints.save(1, old, {"step": 1}, {}, None)
        failure = None
        with failing_disk(fault, number, run, lasting) as failed:
            try:
                checkpoints.save(1, new, {"step": 1}, {}, None)
                lora.save(new, run / "adapter")
            except OSError as error:
                failure = error
        if failure is None:
            written = load_file(run / "adapter" / lora.WEIGHTS)
            assert all(torch.equal(written[key], value) for key, value in expected.items())
        checkpoints.recover()
        if fault != DELETED:
            assert not checkpoints.newest().damage()
            assert lasting or lora.read(run / "adapter").rank == 2
        assert sorted(path.name for path in run.glob("checkpoints/*")) in ([], ["step_000001"])
        if not failed:
            break
    assert number > 8


@pytest.mark.parametrize(("fault", "number"), [("EDQUOT", 9), (DELETED, 8)])
def test_a_last_save_that_fails_ends_non_zero_and_the_same_command_finishes_the_run(bench, fault, number):
    assert "call" in soak.fail_save(bench, fault, number)


def test_a_run_killed_again_and_again_ends_as_if_undisturbed(bench):
    assert soak.soak(bench, 5, spacing=(2, 3))["kills"] >= 1


@pytest.fixture(scope="module")
def finished(twin, tmp_path_factory):
    """A function that runs the same command of one step again; its folder."""
    run = tmp_path_factory.mktemp("finished") / "run"
    keys = dict(num_frames=1, decode_frame=0, max_train_steps=1, ema_decay=0.9)
    return lambda **changes: (twin_runs.start(twin, run, **{**keys, **changes}), run)


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_the_adapter_of_a_finished_run_is_written_again(finished, harm):
    code, run = finished()
    weights = run / "adapter" / lora.WEIGHTS
    content = weights.read_bytes()
    shutil.rmtree(weights.parent)
    if harm == "damaged":
        weights.parent.mkdir()
        weights.write_bytes(content[:100])
    assert (code, finished()[0]) == (0, 0)
    assert weights.read_bytes() == content


def test_a_disk_too_small_for_the_run_is_refused_before_the_first_step(finished, monkeypatch, capsys):
    assert finished()[0] == 0
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda _: usage)
    capsys.readouterr()
    code, run = finished(max_train_steps=2, checkpointing_steps=1)
    told = capsys.readouterr().err
    checkpoint = Checkpoints(run / "checkpoints", 1).newest().folder
    size = sum(file.stat().st_size for file in checkpoint.rglob("*"))
    needed = int(told.partition("needs ")[2].partition(" ")[0].replace(",", ""))
    assert code == 2 and "has 1,000 bytes free" in told and "make room" in told
    adapter = (checkpoint / "adapter" / lora.WEIGHTS).stat().st_size
    assert needed == pytest.approx(size + adapter, rel=0.3)  # the files' headers are not counted
    assert len(soak.rows(run / "metrics.csv")) == 1


@pytest.mark.parametrize(
    ("eight_bits", "keep", "saves", "times"), [(False, 2, 9, 4), (False, 2, 3, 3), (True, 1, 9, 3)]
)
def test_room_is_needed_for_the_kept_checkpoints_the_best_and_the_one_in_the_making(
    tmp_path, eight_bits, keep, saves, times
):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep)
    assert checkpoints.room_needed(100, saves) == 100 * times
    checkpoints.save(1, small_model(0), {}, {}, None)
    assert checkpoints.room_needed(100, saves) == 100 * min(saves, times - (saves > keep + 1))


# The rest of the folder


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"starts": {}}', b'{"starts": [3]}', b"\xff", b"[" * 100_000, b"{}"]
)
def test_a_damaged_environment_file_costs_a_warning(tmp_path, said, content):
    (tmp_path / "environment.json").write_bytes(content)
    assert read_starts(tmp_path) == [] and "environment.json cannot be read" in said()


def test_a_run_folder_whose_name_is_no_text(twin, tmp_path):
    """Bytes that are not UTF-8 in a path: files, log, resuming and the report."""
    run = tmp_path / os.fsdecode(b"caf\xe9")
    keys = dict(num_frames=1, decode_frame=0, max_train_steps=1, verbose=1)
    folder = ["--project-dir", str(run)]
    assert twin_runs.start(twin, tmp_path / "config", *folder, **keys) == 0
    assert twin_runs.start(twin, tmp_path / "config", *folder, **keys | {"max_train_steps": 2}) == 0
    assert lora.read(run / "adapter").rank == 4
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert "continuing from" in log and "the report is" in log
    assert soak.steps_done(run) == 2


# Ctrl-C


def test_an_interrupt_before_the_first_step_is_one_sentence(twin, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "build_backbone", interrupt)
    assert twin_runs.start(twin, tmp_path / "run") == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: interrupted; the same command")


@pytest.mark.parametrize(("ignored", "code"), [(False, 130), (True, 0)])
def test_an_interrupt_during_the_imports_is_one_sentence_and_a_background_job_ignores_it(ignored, code):
    lines = ["import os, signal; from Core.utils.process import quiet_interrupt"]
    handler = "signal.SIG_IGN" if ignored else "signal.default_int_handler"
    lines += [f"signal.signal(signal.SIGINT, {handler})"]
    lines += ["with quiet_interrupt(): os.kill(os.getpid(), signal.SIGINT)"]
    process = python("\n".join(lines), stderr=subprocess.PIPE)
    error = process.communicate()[1]
    assert process.returncode == code and "Traceback" not in error
    assert error.count("interrupted; the same command") == (not ignored)
