"""Pretrain the demo's models and write them to ``assets/demo``.

Run ``python -m scripts.demo.pretrain STAGE …`` from the repository root, with ``all`` for everything. Work in progress
is kept in ``runs/demo_pretrain``: a killed run resumes, and a finished stage is not repeated.
"""

import argparse

import torch

from scripts.demo import reward, text, vae, video, world
from scripts.demo.common import ASSETS, SEED, heldout, log

TRAIN_PROMPTS, HELDOUT_PROMPTS = 1024, 256


def export() -> None:
    """Write all models and prompt lists to ``assets/demo``."""
    vae.export(ASSETS / "vae")
    text.export(ASSETS / "t5")
    video.export(ASSETS / "stdit")
    reward.export(ASSETS / "clip")
    reward.export_head(ASSETS / "aesthetic" / "head.pth")
    prompts()
    size = sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file())
    log("export", f"{size / 1e6:.1f} MB")


def prompts() -> None:
    """Write captions of training scenes and of held-out combinations."""
    shown = [world.caption(world.scene(SEED, i), i) for i in range(TRAIN_PROMPTS)]
    for name, lines in (("train", shown), ("heldout", heldout(HELDOUT_PROMPTS)[1])):
        (ASSETS / f"prompts_{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


STAGES = {
    "vae2d": vae.train_spatial,
    "vae3d": vae.train_temporal,
    "t5": text.train,
    "latents": vae.normalised_latents,
    "decoder": vae.train_decoder,
    "stdit": video.train,
    "clip": reward.train,
    "export": export,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stages", nargs="+", choices=[*STAGES, "all"], metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument("--threads", type=int, default=2)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    for name in STAGES if "all" in flags.stages else flags.stages:
        STAGES[name]()


if __name__ == "__main__":
    main()
