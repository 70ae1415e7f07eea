"""Measure what the savings lose: the demo's training without them, with them, and with a 16-, 8- or 4-bit base.

Paths run one after the other. Each is compared with its own base model, stored as in its training.

``python -m scripts.demo.nothing_lost [--prompts 256] [--json docs/benchmarks/demo-nothing-lost.json] [flags]``
"""

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from Core.config import Config, load_config
from Core.evaluation.metrics import paired_gain
from Core.training.setup import build_trainer
from Core.utils.distributed import Distributed
from Core.utils.tables import read_table
from scripts.bench import page
from scripts.bench.plain import plain_path
from scripts.benchmark import origin
from scripts.demo.common import DEMO
from scripts.demo.compare import compare

PLAIN = "plain"
PATHS: dict[str, list[str]] = {
    PLAIN: [],
    "default": [],
    # The same settings with another prompt order and noise: the spread to expect between equal paths.
    "default, another seed": ["--seed", "201"],
    "dtype='bf16'": ["--dtype", "bf16", "--mixed-precision", "bf16"],
    "dtype='fp8'": ["--dtype", "fp8", "--mixed-precision", "bf16"],
    "base_quant='nf4'": ["--base-quant", "nf4"],
}


def train(config: Config, plain: bool) -> Path:
    """Train on the plain path of ``scripts/bench/plain.py`` or as a user does; the adapter."""
    folder = Path(config.run.project_dir)
    trainer = build_trainer(config, Distributed(config.optimizer.mixed_precision), folder)
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


def measure(prompts: int, flags: list[str]) -> list[dict[str, Any]]:
    """Per path: training seconds, reward, and its difference from the plain path's, paired by video."""
    rows = []
    plain: np.ndarray | None = None
    for name, changes in PATHS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = load_config([str(DEMO), "--project-dir", folder, "--verbose", "0", *flags, *changes])
            adapter = train(config, plain=name == PLAIN)
            result = compare(config, str(adapter), prompts)
            seconds = sum(row["seconds"] for row in read_table(Path(folder) / "metrics.csv"))
        gain, reached = result.gain("reward"), result.after.reward[:, None]
        plain = reached if plain is None else plain
        rows.append({"path": name, "seconds": seconds, "reward": gain.after})
        rows[-1] |= {"gain": asdict(gain), "over_plain": asdict(paired_gain(plain, reached))}
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


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
        "prompts": args.prompts,
        "rows": measure(args.prompts, flags),
        **origin(sys.argv[1:], "-m scripts.demo.nothing_lost"),
    }
    page.deliver(result, args.json)


if __name__ == "__main__":
    main()
