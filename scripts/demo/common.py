"""Shared by all pretraining stages: the work folder, the resumable optimisation loop and batches of frames."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scripts.demo import world

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "demo_pretrain"
ASSETS = ROOT / "assets" / "demo"
DEMO = ROOT / "Open-Sora/configs/opensora-v1-2/vader/vader_demo.py"
SEED = 7
HELDOUT_SEED = 11
HELDOUT_WORDING = 100_000

LossFn = Callable[[np.random.Generator], tuple[Tensor, dict[str, float]]]


def log(stage: str, line: str) -> None:
    """Print a progress line and append it to ``pretrain.log`` in the work folder."""
    WORK.mkdir(parents=True, exist_ok=True)
    text = f"[{time.strftime('%H:%M:%S')}] {stage}: {line}"
    print(text, flush=True)
    with open(WORK / "pretrain.log", "a", encoding="utf-8") as file:
        file.write(text + "\n")


def save(state: dict, path: Path) -> None:
    """Write a checkpoint atomically: a killed process leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then cosine decay to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Ema:
    """Exponential moving average of a model's parameters, with the usual lower decay at the start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def update(self, model: nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value.detach(), 1 - decay)


def build_optimizers(
    model: nn.Module, lr: float, muon_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW for all trainable parameters, or for those not given to Muon."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if muon_lr and "blocks" in name and p.dim() == 2]
    rest = [p for p in trained.values() if not any(p is matrix for matrix in matrices)]
    optimizers = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)]
    if matrices:
        scaled = dict(lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(torch.optim.Muon(matrices, **scaled))
    return optimizers


@torch.enable_grad()
def fit(
    name: str,
    model: nn.Module,
    loss_fn: LossFn,
    *,
    steps: int,
    lr: float,
    warmup: int = 100,
    weight_decay: float = 1e-2,
    muon_lr: float = 0.0,
    ema_decay: float = 0.995,
    save_every: int = 200,
) -> None:
    """Minimise ``loss_fn`` over the model's trainable parameters and leave the EMA weights in ``model``.

    Uses AdamW at ``lr``; with ``muon_lr``, matrices inside transformer blocks use Muon (Jordan, 2024) at that rate.

    Each step draws from generators seeded by (SEED, step), so a killed run resumes exactly. The finished state is kept
    at ``WORK/<name>.pt``; a second call loads it and returns.
    """
    path = WORK / f"{name}.pt"
    params = [p for p in model.parameters() if p.requires_grad]
    optimizers = build_optimizers(model, lr, muon_lr, weight_decay)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    ema, start, spent = Ema(model, ema_decay), 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        ema.state, ema.count, start, spent = saved["ema"], saved["step"], saved["step"], saved["seconds"]
    begun = time.time()
    for step in range(start, steps):
        torch.manual_seed(SEED * 1_000_003 + step)
        for group, peak in groups:
            group["lr"] = peak * lr_factor(step, steps, warmup)
        loss, logs = loss_fn(np.random.default_rng([SEED, step]))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.update(model)
        done, seconds = step + 1, spent + time.time() - begun
        if done % 50 == 0 or done == steps:
            figures = "  ".join(f"{k} {v:.4f}" for k, v in {"loss": float(loss.detach()), **logs}.items())
            log(name, f"step {done}/{steps}  {figures}  {seconds:.0f} s")
        if done % save_every == 0 or done == steps:
            states = [optimizer.state_dict() for optimizer in optimizers]
            state = {"model": model.state_dict(), "optimizers": states, "ema": ema.state}
            save({**state, "step": done, "seconds": seconds}, path)
    model.load_state_dict(ema.state)


def to_pixels(video: np.ndarray) -> Tensor:
    """``uint8 [..., H, W, 3]`` → ``float [..., 3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(video).movedim(-1, -3).float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> np.ndarray:
    """``float [..., 3, H, W]`` in [-1, 1] → ``uint8 [..., H, W, 3]``."""
    return ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).numpy()


def draw_scenes(rng: np.random.Generator, n: int) -> list[world.Scene]:
    """``n`` new scenes from the train split."""
    return [world.scene(SEED, int(rng.integers(1 << 40))) for _ in range(n)]


def draw_frames(rng: np.random.Generator, n: int) -> Tensor:
    """``n`` single frames of new training videos, ``[B, 3, H, W]`` in [-1, 1]."""
    frames = [world.render(s, [int(rng.integers(world.FRAMES))])[0] for s in draw_scenes(rng, n)]
    return to_pixels(np.stack(frames))


def near_shape(pixels: Tensor) -> Tensor:
    """1 on or within 2 pixels of saturated colour, else 0: ``[B, 3, H, W]`` → ``[B, 1, H, W]``."""
    chroma = pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)
    return nn.functional.max_pool2d((chroma > 0.5).float(), 5, stride=1, padding=2)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two images in [-1, 1]."""
    return float(10 * torch.log10(4 / (a - b).clamp(-2, 2).pow(2).mean()))


def heldout(n: int, seed: int = HELDOUT_SEED) -> tuple[list[world.Scene], list[str]]:
    """``n`` held-out scenes and their captions; with the default seed, the lines of ``prompts_heldout.txt``."""
    scenes = [world.scene(seed, i, "test") for i in range(n)]
    return scenes, [world.caption(scene, HELDOUT_WORDING + i) for i, scene in enumerate(scenes)]
