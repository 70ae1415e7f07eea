"""Whether two run folders hold the same run, bit for bit."""

import csv
from pathlib import Path

import torch
from safetensors.torch import load_file

from Core.training.checkpoint import Checkpoints

TIMED = ("seconds", "all_reduce_share")  # beginnings of the columns that differ from run to run


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def largest_difference(a: Path, b: Path) -> float:
    first, second = adapter(a), adapter(b)
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def rows(file: Path) -> list[dict[str, str]]:
    """Rows without the columns that tell time."""
    with open(file, newline="") as stream:
        return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in csv.DictReader(stream)]


def checkpoint_state(run: Path) -> dict:
    return Checkpoints(run / "checkpoints", 1).newest().state()


def assert_equal(a, b) -> None:
    """Bit for bit, through dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for first, second in zip(a, b, strict=True):
            assert_equal(first, second)
    else:
        assert a == b


def assert_same_training(a: Path, b: Path) -> None:
    """Adapter, optimiser, moving average and tables are those of an undisturbed run."""
    assert largest_difference(a, b) == 0
    assert_equal(checkpoint_state(a), checkpoint_state(b))
    for table in ("metrics.csv", "validation.csv"):
        assert rows(a / table) == rows(b / table)


def assert_same_run(a: Path, b: Path) -> None:
    """The same training, and the same videos and checkpoints by name."""
    assert_same_training(a, b)
    made = [{p.relative_to(run) for p in run.glob("samples/*/*") if p.suffix != ".jsonl"} for run in (a, b)]
    assert made[0] == made[1]
    names = [[c.folder.name for c in Checkpoints(run / "checkpoints", 1).all()] for run in (a, b)]
    assert names[0] == names[1]
