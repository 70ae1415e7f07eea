"""Runs the training script in patched checkouts: exercise.py HUB LOGS CHECKOUT COMMAND… [-- CHECKOUT COMMAND…].

A command is a command line of scripts/train_t2v_lora.py, or ``weights``, which fills the HUB's empty cache with small
random ones of the stand-in's networks. Each checkout has a process of its own, whose output goes to LOGS/<number>.txt
with the commands' exit statuses. They are forked from one that has imported what they share, which takes longer than
all they do.
"""

import itertools
import os
import runpy
import shlex
import sys
from pathlib import Path

SIZES = dict(depth=1, hidden_size=32, num_heads=2, caption_channels=32, model_max_length=24)
IMAGE_VAE = dict(
    block_out_channels=(8, 8, 8, 8),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=4,
)


def snapshot(hub: Path, repository: str) -> Path:
    """Folder of a repository in a cache of the hub."""
    folder, commit = hub / f"models--{repository.replace('/', '--')}", "0" * 40
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit, encoding="utf-8")
    return folder / "snapshots" / commit


def save_image_vae(hub: Path) -> None:
    from diffusers import AutoencoderKL

    folder = snapshot(hub, "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers")
    AutoencoderKL(**IMAGE_VAE).save_pretrained(folder / "vae")


def save(model, folder: Path) -> None:
    from safetensors.torch import save_file

    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})


def make_weights(hub: Path) -> None:
    """The stand-in's networks by upstream's own registry, and its sampler used as upstream's scripts do."""
    import torch

    import opensora.models  # noqa: F401
    import opensora.schedulers  # noqa: F401
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config
    from opensora.registry import MODELS, SCHEDULERS, build_module

    torch.manual_seed(0)
    save_image_vae(hub)
    model = STDiT3(STDiT3Config(**SIZES)).eval()
    save(model, snapshot(hub, "hpcai-tech/OpenSora-STDiT-v3"))
    vae = build_module(dict(type="OpenSoraVAE_V1_2", local_files_only=True), MODELS)
    save(vae, snapshot(hub, "hpcai-tech/OpenSora-VAE-v1.2"))
    scheduler = build_module(dict(type="rflow", sample_method="logit-normal"), SCHEDULERS)
    assert type(scheduler).__module__ == "Core.backbones.opensora_sampling", type(scheduler)
    kwargs = dict(y=torch.randn(2, 1, 24, 32), **{k: torch.ones(2) for k in ("fps", "height", "width")})
    losses = scheduler.training_losses(
        model, torch.randn(2, 4, 2, 4, 4), kwargs, t=torch.tensor([10.0, 900.0])
    )
    assert losses["loss"].shape == (2,)


def command(line: str) -> None:
    sys.argv = ["scripts/train_t2v_lora.py", *shlex.split(line)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as status:
        print("exit", status.code, flush=True)


def visit(checkout: Path, lines: list[str], hub: Path, log: Path) -> None:
    """Run the commands in a process of their own; its status counts."""
    if child := os.fork():
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(f"{log} says what went wrong: {status}")
        return
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    for line in lines:
        make_weights(hub) if line == "weights" else command(line)
    sys.exit()


if __name__ == "__main__":
    import accelerate  # noqa: F401
    import mmengine.config  # noqa: F401
    import peft  # noqa: F401
    from diffusers import AutoencoderKL  # noqa: F401
    from transformers import T5EncoderModel  # noqa: F401

    hub, logs, *words = sys.argv[1:]
    groups = [list(group) for end, group in itertools.groupby(words, lambda word: word == "--") if not end]
    for number, (checkout, *lines) in enumerate(groups):
        visit(Path(checkout), lines, Path(hub), Path(logs) / f"{number}.txt")
