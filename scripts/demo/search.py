"""Search for the demo's training settings; each setting tried is a row of search_results.csv.

``python -m scripts.demo.search 'lr=1e-3 backprop_steps=2' 'lr=2e-3' …``: each argument is one setting, a list of keys
that override vader_demo.py. Settings are compared on held-out captions that the quickstart does not use. Settings
already in the table are not rerun.
"""

import csv
import os
import shutil
import sys
import time

import torch

from Core.config import load_config
from scripts.demo.common import ROOT
from scripts.demo.compare import Comparison, compare, train
from scripts.demo.quickstart import CONFIG

RESULTS = ROOT / "scripts" / "demo" / "search_results.csv"
SCENE_SEED = 12  # not the quickstart's
PROMPTS = 64


def train_and_compare(setting: str) -> dict[str, object]:
    """One row: the setting, its gains with 95% intervals, and seconds per training step."""
    folder = ROOT / "runs" / "search" / "".join(c if c.isalnum() else "_" for c in setting)
    shutil.rmtree(folder, ignore_errors=True)
    fixed = [f"project_dir={folder}", "validation_steps=100000", "checkpointing_steps=100000"]
    config = load_config([str(CONFIG), "--cfg-options", *fixed, *setting.split()])
    started = time.perf_counter()
    train(config)
    seconds = time.perf_counter() - started
    result = compare(config, str(folder / "adapter"), PROMPTS, SCENE_SEED)
    return {"setting": setting, "seconds": round(seconds), **numbers(result)}


def numbers(result: Comparison) -> dict[str, object]:
    row: dict[str, object] = {"true": round(result.true_reward, 2)}
    for name in ("reward", "colour_and_shape", "direction", "motion"):
        gain = result.gain(name)
        for key in ("before", "after", "gain", "low", "high"):
            row[f"{name}_{key}"] = round(getattr(gain, key), 4)
    return {**row, "share": round(result.share_of_distance, 3)}


def finished() -> set[str]:
    if not RESULTS.is_file():
        return set()
    with open(RESULTS, encoding="utf-8", newline="") as file:
        return {row["setting"] for row in csv.DictReader(file)}


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for setting in sys.argv[1:]:
        if setting in finished():
            continue
        row = train_and_compare(setting)
        new = not RESULTS.is_file()
        with open(RESULTS, "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
