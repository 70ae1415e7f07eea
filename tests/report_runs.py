"""Run folders with everything a report shows, written without training anything."""

import json
import math
from pathlib import Path

import torch
from sampling_runs import picture

from Core.config import build_config
from Core.evaluation.compare import Row, per_prompt, summary, write_tables
from Core.utils.environment import record_environment

COLOURS, PLACES = ("red", "grey", "white"), ("snow", "mud", "rain")
PROMPTS = [f"a {colour} fox runs through {place}" for colour in COLOURS for place in PLACES]


def training_run(folder: Path, steps: int = 60) -> Path:
    """Curves, validation, configuration, log and videos of two validations."""
    folder.mkdir(parents=True)
    header = (
        "step,reward,loss,grad_norm,lr,skipped,seconds,seconds_prefix,seconds_gradient_steps,seconds_decode"
    )
    rows = [header]
    for step in range(1, steps + 1):
        reward = 20 + 4 * (1 - math.exp(-step / 20)) + math.sin(step * 7)
        rows.append(f"{step},{reward},{1 - reward / 100},{0.02 / step**0.5},0.0002,0,1.2,0.7,0.3,0.2")
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    held_out = [
        f"{step},{20 + 3 * step / steps},{0.4 - 0.1 * step / steps}" for step in range(0, steps + 1, 20)
    ]
    (folder / "validation.csv").write_text("\n".join(["step,reward,motion", *held_out]) + "\n")
    values = {
        "prompt": PROMPTS,
        "model": {"type": "STDiT3-XL/2", "from_pretrained": "hpcai-tech/OpenSora-STDiT-v3"},
        "vae": {"type": "OpenSoraVAE_V1_2", "from_pretrained": "hpcai-tech/OpenSora-VAE-v1.2"},
        "text_encoder": {"type": "t5", "from_pretrained": "DeepFloyd/t5-v1_1-xxl", "model_max_length": 300},
        "scheduler": {"type": "rflow", "num_sampling_steps": 30, "cfg_scale": 7.0},
        "project_dir": str(folder),
    }
    build_config(values).save(folder / "config.py")
    (folder / "log.txt").write_text("2024-05-01 10:00:00,000 WARNING motion falls while the reward rises\n")
    record_environment(folder)
    for step in (0, steps):
        samples = folder / "samples" / f"step_{step:06d}"
        samples.mkdir(parents=True)
        entry = {"name": "0000_0_a_fox", "file": "0000_0_a_fox.mp4", "prompt": PROMPTS[0], "seed": 200}
        picture(samples / "0000_0_a_fox", frames=9, seed=step)
        (samples / "prompts.jsonl").write_text(json.dumps(entry) + "\n")
    return folder


def write_manifest(folder: Path) -> None:
    """The ``prompts.jsonl`` of the videos in ``folder``."""
    entries = [{"name": path.stem, "file": path.name} for path in sorted(folder.glob("*.mp4"))]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def evaluation(folder: Path, adapters: tuple[str, ...] = ("fox",)) -> Path:
    """An evaluation whose adapters gain ``hps`` on all but two prompts and lose ``motion``; a video per row."""
    rows, generator = [], torch.Generator().manual_seed(0)
    for number, variant in enumerate(("base", *adapters)):
        (folder / "videos" / variant).mkdir(parents=True)
        for index, prompt in enumerate(PROMPTS):
            for seed in (200, 201):
                noise = torch.randn((), generator=generator).item()
                gain = 0 if number == 0 else 3 * number if index < 7 else -1
                scores = {"hps": 20 + gain + 0.3 * noise, "motion": 0.3 - 0.1 * number}
                file = f"videos/{variant}/{index:04d}_{seed}"
                picture(folder / file, frames=9, seed=100 * number + index)
                rows.append(Row(variant, index, prompt, seed, f"{file}.mp4", index < 2, scores))
        write_manifest(folder / "videos" / variant)
    result = {
        "adapters": [{"name": name, "adapter": f"runs/{name}/adapter"} for name in adapters],
        "rewards": {"hps": {}},
        "lower_is_better": [],
        "prompts": len(PROMPTS),
        "num_sample": 2,
        "seeds": [200, 201],
        "training_prompts": 2,
        "summary": summary(rows, set()),
        "per_prompt": per_prompt(rows, set()),
    }
    write_tables(folder, rows, result)
    return folder
