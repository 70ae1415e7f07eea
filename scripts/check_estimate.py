"""Compare the estimate with real steps on a CPU: `python scripts/check_estimate.py [NAME …] [--json FILE]`.

Peak bytes are counted by PyTorch's allocator while a training step runs on the demo and on the tests' tiny twin, at
the settings below; operations by the operators that ran.
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora"), str(ROOT / "tests")]

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from Core.config import Config, build_config, load_config  # noqa: E402
from Core.estimate.fake_run import fake_run  # noqa: E402
from Core.estimate.operations import WorkCounter, operations_in  # noqa: E402
from Core.training.setup import build_trainer  # noqa: E402
from Core.utils.distributed import Distributed  # noqa: E402
from Core.utils.files import write_whole  # noqa: E402

DEMO = ROOT / "Open-Sora/configs/opensora-v1-2/vader/vader_demo.py"
PROCESSES = {"demo, each of 2 sharded": 2}
# Name → what is changed; the first word says of what.
SETTINGS: dict[str, dict[str, Any]] = {
    "demo": {},
    "demo, window of 1": {"backprop_steps": 1},
    "demo, 51 frames": {"num_frames": 51, "train_batch_size": 2},
    "demo, batch of 2": {"train_batch_size": 2},
    "demo, recomputed": {"grad_checkpoint": True, "backprop_steps": 6},
    "demo, rank 128": {"lora_rank": 128, "train_batch_size": 2},
    "demo, all frames": {"decode_frame": "all", "train_batch_size": 4},
    "demo, causal decoding": {"decode_context": "causal", "decode_frame": 2, "train_batch_size": 2},
    "demo, each of 2 sharded": {"shard_frozen": True, "train_batch_size": 2},
    "demo, leap": {"objective": "leap", "train_batch_size": 2},
    **{
        f"demo, {objective}": {"objective": objective, "train_batch_size": 4, "group_size": 4}
        for objective in ("grpo", "nft", "dpo")
    },
    "twin": {},
    "twin, recomputed, both branches": {"grad_checkpoint": True, "gradient_accumulation_steps": 2},
}
# Kernels of oneDNN copy a convolution's inputs. Without them, where the peak is in one:
PLAIN = ", without oneDNN"
SETTINGS |= {name + PLAIN: SETTINGS[name] for name in ("demo, recomputed", "demo, nft")}


def config_of(name: str, folder: Path) -> Config:
    changes = {**SETTINGS[name], "project_dir": str(folder / "run"), "verbose": 0}
    if name.startswith("demo"):
        return load_config(
            [str(DEMO), "--cfg-options", *(f"{key}={value}" for key, value in changes.items())]
        )
    import twins

    return build_config(twins.settings(twins.save_twin(folder / "twin"), folder / "run", **changes))


def measure(config: Config, folder: Path) -> tuple[int, float]:
    """Peak bytes and operations of a training step after the first, which makes the optimiser's state."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(config, Distributed(config.optimizer.mixed_precision), folder)
    trainer.train_step()
    gc.collect()
    standing = bytes_alive()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train_step()
    counter = WorkCounter()
    with counter:
        trainer.train_step()
    counter.lap("step")
    trainer.trackers.close()
    return standing + peak_allocated(profiler), operations_in(counter.phases["step"])


def measure_together(name: str, folder: Path, processes: int) -> tuple[int, float]:
    """``measure`` in so many processes at once; the figures are the first one's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    joined = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    started = []
    for rank in map(str, range(processes)):
        own = {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, __file__, name, "--as-one-of", str(folder)]
        started.append(subprocess.Popen(command, env=os.environ | joined | own))
    if any([process.wait() for process in started]):
        raise RuntimeError(f"{name}: a process failed")
    peak, operations = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    return peak, operations


def measure_as_one(name: str, folder: Path) -> None:
    measured = measure(config_of(name, folder), folder / "run")
    if os.environ["RANK"] == "0":
        write_whole(folder / "measured.json", json.dumps(measured))


def bytes_alive() -> int:
    """Of all tensors that Python knows of."""
    storages = {
        id(storage): storage.nbytes()
        for tensor in gc.get_objects()
        # What is split over processes shows beside the part that is here.
        if isinstance(tensor, torch.Tensor) and not hasattr(tensor, "_local_tensor")
        if tensor.device.type == "cpu"
        for storage in [tensor.untyped_storage()]
    }
    return sum(storages.values())


def peak_allocated(profiler: profile) -> int:
    """The most that the allocator had given out since the profiler began."""
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def compare(name: str) -> dict[str, Any]:
    one_dnn = torch.backends.mkldnn.flags(enabled=not name.endswith(PLAIN))
    with tempfile.TemporaryDirectory() as folder, one_dnn:
        config, processes = config_of(name, Path(folder)), PROCESSES.get(name, 1)
        estimated = fake_run(config, processes, on_card=False, whole=True, validate=False)
        if processes > 1:
            peak, operations = measure_together(name, Path(folder), processes)
        else:
            peak, operations = measure(config, Path(folder) / "run")
    return {
        "name": name,
        "estimated_peak": max(phase.peak for phase in estimated.step.values()),
        "measured_peak": peak,
        "estimated_operations": sum(phase.operations for phase in estimated.step.values()),
        "counted_operations": operations,
    }


def line(found: Mapping[str, Any]) -> str:
    ratio = found["estimated_peak"] / found["measured_peak"]
    same = found["estimated_operations"] == found["counted_operations"]
    return (
        f"{found['name']:34} peak {found['estimated_peak'] / 1e6:9.2f} MB, measured "
        f"{found['measured_peak'] / 1e6:9.2f} MB ({ratio - 1:+.1%}); operations "
        f"{found['estimated_operations'] / 1e9:.4f} G, counted {found['counted_operations'] / 1e9:.4f} G"
        f"{'' if same else '  NOT EQUAL'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(SETTINGS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures into it")
    parser.add_argument("--as-one-of", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_one_of:
        measure_as_one(args.names[0], args.as_one_of)
        return
    for name in args.names or SETTINGS:
        found = compare(name)
        print(line(found), flush=True)
        if args.json:
            renew(args.json, found)


def renew(file: Path, found: dict[str, Any]) -> None:
    """Write the figures of one setting beside those of others that are in the file."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    rows = {row["name"]: row for row in [*before, found]}
    kept = [rows[name] for name in SETTINGS if name in rows]
    write_whole(file, json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
