"""Checkpoints, tables, resuming and faults of the disk."""

import csv
import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from Core.evaluation.score_videos import write_csv
from Core.modules import lora
from Core.training.checkpoint import Checkpoint, Checkpoints
from Core.utils.tables import CsvTable, read_table, read_text_table


def small_model(seed: int = 0):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return lora.attach(model, ["0"], rank=2, alpha=2, seed=seed)


def save(checkpoints: Checkpoints, step: int, score: float | None = None, **state) -> Checkpoint:
    checkpoints.save(step, small_model(), {"step": step, **state}, {"lr": 1.0}, score)
    return Checkpoint(checkpoints.folder / f"step_{step:06d}")


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def steps(checkpoints: Checkpoints) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints.all()]


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, score in enumerate([0.1, 0.9, None, 0.3, 0.2]):
        save(checkpoints, step, score)
    assert steps(checkpoints) == [1, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000003", "step_000004"]


@pytest.mark.parametrize("file", ["state.pt", "adapter/adapter_model.safetensors", "manifest.json"])
@pytest.mark.parametrize("harm", ["truncated", "bit flipped", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog, monkeypatch, file, harm):
    checkpoints = Checkpoints(tmp_path, keep=3)
    save(checkpoints, 1)
    damaged = save(checkpoints, 2).folder / file
    content = bytearray(damaged.read_bytes())
    if harm == "truncated":
        damaged.write_bytes(content[: len(content) // 2])
    elif harm == "bit flipped":
        content[0 if file == "manifest.json" else len(content) // 2] ^= 1
        damaged.write_bytes(content)
    else:
        damaged.unlink()
    monkeypatch.setattr(logging.getLogger("vader"), "propagate", True)
    assert checkpoints.newest().step == 1
    assert "step_000002 is damaged" in caplog.text and Path(file).name in caplog.text


@pytest.mark.parametrize(
    "manifest",
    [b"[]", b"{}", b"3", b"\xff", b"[" * 100_000, b'{"step": 2, "config": {}, "sha256": {}}',
     b'{"step": 2, "config": [], "sha256": {}}'],
)  # fmt: skip
def test_a_manifest_of_another_form_is_damage(tmp_path, caplog, monkeypatch, manifest):
    checkpoints = Checkpoints(tmp_path, keep=3)
    save(checkpoints, 1)
    (save(checkpoints, 2).folder / "manifest.json").write_bytes(manifest)
    monkeypatch.setattr(logging.getLogger("vader"), "propagate", True)
    assert checkpoints.newest().step == 1
    assert "its manifest.json cannot be read" in caplog.text and "begins at step 0" not in caplog.text
    checkpoints.prune()
    (tmp_path / "step_000001" / "manifest.json").write_bytes(manifest)
    assert checkpoints.newest() is None and "begins at step 0" in caplog.text


def test_a_checkpoint_replaced_when_the_power_failed_is_still_there(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, mark="old")
    rename = Path.rename

    def fail_at_last_rename(path, target):
        if path.name == ".step_000001.partial":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_at_last_rename)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 1, mark="new")
    monkeypatch.undo()
    assert steps(checkpoints) == []
    checkpoints.recover()
    assert checkpoints.newest().state()["mark"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB, where the machine lets tests mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_os_error_that_leaves_earlier_checkpoints_alone(small_disk):
    checkpoints = Checkpoints(small_disk, keep=5)
    before = save(checkpoints, 1)
    with pytest.raises(OSError, match="No space left"):
        save(checkpoints, 2, big=torch.zeros(100_000))
    assert steps(checkpoints) == [1] and not before.damage()
    assert [path.name for path in small_disk.iterdir()] == ["step_000001"]
    save(checkpoints, 3)
    assert steps(checkpoints) == [1, 3]


def test_rows_refused_by_a_full_disk_are_written_once_there_is_room(small_disk, caplog):
    table = CsvTable(small_disk / "metrics.csv")
    table.append({"step": 1, "reward": 0.5})
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    for step in range(2, 100):
        table.append({"step": step, "reward": 0.25, "note": "x" * 100})
    assert len(read_rows(table.path)) < 99
    filler.unlink()
    table.append({"step": 100, "reward": 0.75})
    assert [row["step"] for row in read_rows(table.path)] == [str(step) for step in range(1, 101)]


def test_a_disk_that_became_read_only_leaves_earlier_checkpoints_alone(small_disk):
    checkpoints = Checkpoints(small_disk, keep=5)
    before = save(checkpoints, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only"):
        save(checkpoints, 2)
    assert steps(checkpoints) == [1] and not before.damage()


def test_a_table_drops_the_rows_of_steps_that_are_done_again_and_half_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    table = CsvTable(path)
    for step in range(1, 6):
        table.append({"step": step, "reward": step / 8})
    with open(path, "a") as file:
        file.write("6,0.1")
    assert [row["step"] for row in read_table(path)] == [1, 2, 3, 4, 5]
    CsvTable(path, resume_step=3).append({"step": 4, "reward": 0.0})
    assert [row["step"] for row in read_table(path)] == [1, 2, 3, 4]
    assert path.read_text().splitlines()[0] == "step,reward"


@pytest.mark.parametrize("harm", ["deleted", "replaced", "folder deleted"])
def test_a_table_that_was_deleted_or_replaced_comes_back_whole(tmp_path, harm):
    path = tmp_path / "run" / "metrics.csv"
    path.parent.mkdir()
    table = CsvTable(path)
    for step in (1, 2):
        table.append({"step": step, "reward": 0.5})
    shutil.rmtree(path.parent) if harm == "folder deleted" else path.unlink()
    if harm == "replaced":
        path.write_text("somebody else's\n")
    table.append({"step": 3, "reward": 0.25})
    assert path.read_text() == "step,reward\n1,0.5\n2,0.5\n3,0.25\n"


@pytest.mark.parametrize(
    ("content", "kept", "lines"),
    [
        (b"step,reward\n1,0.5\n2,0.2\xff\n3\n4,1\n", ["1", "4"], "lines 3, 4"),
        (b'step,reward\n1,"0.5\n2,0.5\n', ["2"], "lines 2"),
        (b"step,reward\n1,0.5\n2,0\x00.5\n", ["1"], "lines 3"),
        (b"stop,reward\n1,0.5\n2,0.5\n", [], "lines 2, 3"),
        (b"\x00\xff\n\n", [], "lines 2"),
    ],
)
def test_rows_that_are_damaged_when_a_run_continues_are_named_and_kept_aside(
    tmp_path, caplog, monkeypatch, content, kept, lines
):
    monkeypatch.setattr(logging.getLogger("vader"), "propagate", True)
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    CsvTable(path, resume_step=9).append({"step": 10, "reward": 0.0})
    assert [row["step"] for row in read_rows(path)] == [*kept, "10"]
    assert f"are left out ({lines})" in caplog.text
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == content


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=cmd|'/C calc'!A0", "'=cmd|'/C calc'!A0"), ("@sum", "'@sum"), ("- a fox", "'- a fox"), ("+x", "'+x"),
        ("'=x", "''=x"), ("-1.5", "-1.5"), ("'tis", "'tis"), ("a fox, running", "a fox, running"),
    ],
)  # fmt: skip
def test_text_that_a_spreadsheet_would_run_is_inert_and_read_back_as_it_was(tmp_path, cell, written):
    path = tmp_path / "videos.csv"
    write_csv(path, [{"prompt": cell, "reward": -1.5}])
    assert read_rows(path) == [{"prompt": written, "reward": "-1.5"}]
    assert read_text_table(path) == [{"prompt": cell, "reward": "-1.5"}]


def test_a_new_column_appears_in_the_middle_of_a_table(tmp_path):
    table = CsvTable(tmp_path / "validation.csv")
    table.append({"step": 0, "reward": 1.0})
    table.append({"step": 1, "reward": 2.0, "motion": 0.5})
    assert read_rows(table.path) == [
        {"step": "0", "reward": "1.0", "motion": ""},
        {"step": "1", "reward": "2.0", "motion": "0.5"},
    ]


def test_an_adapter_is_replaced_whole_and_read_by_peft(tmp_path):
    from peft import PeftModel

    model = small_model()
    lora.save(model, tmp_path / "adapter")
    with torch.no_grad():
        for parameter in lora.parameters(model).values():
            parameter.fill_(0.5)
    lora.save(model, tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert os.listdir(tmp_path) == ["adapter"]
    assert all(
        bool((value == 0.5).all())
        for value in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    )
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base.load_state_dict({k: v for k, v in model.unload().state_dict().items()})
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert all(bool((p == 0.5).all()) for name, p in loaded.named_parameters() if "lora_" in name)
