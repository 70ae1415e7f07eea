"""That the savings lose nothing: the quickstart's training without and with them, from the same seed.

``python -m scripts.demo.nothing_lost [--prompts 256] [--json docs/benchmarks/demo-nothing-lost.json] [flags]``
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from Core.config import load_config
from Core.evaluate import paired_gain
from Core.runtime import Runtime
from Core.tracking import read_table
from Core.training import build_trainer
from scripts.bench import page
from scripts.bench.plain import plain_path
from scripts.benchmark import origin
from scripts.demo.compare import compare
from scripts.demo.quickstart import CONFIG

PATHS = ("plain", "default")


def train(config, plain: bool) -> Path:
    """Train on the plain path of ``scripts/bench/plain.py`` or as a user does; the adapter."""
    folder = Path(config.project_dir)
    trainer = build_trainer(config, Runtime(config.mixed_precision), folder)
    context: Any = nullcontext()
    if plain:
        context = plain_path(trainer, trainer.backbone.text_encoder(), lambda name: None)
    try:
        with context:
            trainer.fit()
    finally:
        trainer.trackers.close()
    if trainer.step < trainer.total_steps:
        raise SystemExit(
            f"stopped after step {trainer.step} of {trainer.total_steps}; there is nothing to compare"
        )
    return folder / "adapter"


def measure(prompts: int, flags: list[str]) -> dict[str, Any]:
    """Seconds of training and rewards of both paths' adapters, and their difference, paired by video."""
    rows, scores = [], []
    for name in PATHS:
        with tempfile.TemporaryDirectory() as folder:
            config = load_config([str(CONFIG), "--project-dir", folder, "--verbose", "0", *flags])
            adapter = train(config, plain=name == "plain")
            result = compare(config, str(adapter), prompts)
            seconds = sum(row["seconds"] for row in read_table(Path(folder) / "metrics.csv"))
        gain = result.gain("reward")
        scores.append(result.after.reward)
        rows.append({"path": name, "seconds": seconds, "reward": gain.after, "gain": gain.gain})
        rows[-1] |= {"low": gain.low, "high": gain.high}
        print(json.dumps(rows[-1]), file=sys.stderr)
    plain, default = (np.asarray(score)[:, None] for score in scores)
    difference = paired_gain(plain, default)
    kept = {"difference": difference.gain, "low": difference.low, "high": difference.high}
    return {"prompts": prompts, "rows": rows, "default_over_plain": kept}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--json", type=Path, help="also write the result there")
    args, flags = parser.parse_known_args()
    result = {
        "preset": "demo",
        "threads": torch.get_num_threads(),
        "kind": "paths",
        **measure(args.prompts, flags),
        **origin(sys.argv[1:], "-m scripts.demo.nothing_lost"),
    }
    page.deliver(result, args.json)


if __name__ == "__main__":
    main()
