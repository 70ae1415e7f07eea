"""Training by reward gradient: sample, decode, score, and follow the gradient into the adapter.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, F chosen frames, H, W pixels.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from Core import draws, lora
from Core.backbones import Backbone
from Core.checkpoint import Checkpoint, Checkpoints
from Core.decode import choose_frames
from Core.evaluate import score_videos
from Core.inference import plan_samples, write_videos
from Core.prompts import Prompt
from Core.rewards import Reward, RewardOutput
from Core.runtime import Runtime
from Core.schedulers.rf import euler_sample, first_gradient_step
from Core.tracking import Trackers

logger = logging.getLogger("vader")


@dataclass(frozen=True)
class StepMetrics:
    """One optimiser step, averaged over its global batch."""

    reward: float
    loss: float
    grad_norm: float
    seconds: float
    parts: dict[str, float]
    skipped: bool

    def scalars(self, lr: float) -> dict[str, float]:
        named = {"reward": self.reward, "loss": self.loss, "grad_norm": self.grad_norm, "lr": lr}
        named |= {"seconds": self.seconds, "skipped": float(self.skipped), **self.parts}
        return {f"train/{name}": value for name, value in named.items()}


class Trainer:
    """Everything a run needs, built and on its device.

    Args:
        text: features [L, D] of every caption of ``prompts`` and ``val_prompts``.
        folder: the run folder.
    """

    def __init__(
        self,
        config,
        runtime: Runtime,
        backbone: Backbone,
        reward: Reward,
        prompts: Sequence[Prompt],
        val_prompts: Sequence[Prompt],
        text: Mapping[str, Tensor],
        folder: Path,
        trackers: Trackers,
    ):
        self.config, self.runtime, self.backbone, self.reward = config, runtime, backbone, reward
        self.prompts, self.val_prompts, self.text = prompts, val_prompts, text
        self.folder, self.trackers = folder, trackers
        self.parameters = list(lora.parameters(backbone.denoiser).values())
        self.optimizer = runtime.prepare(build_optimizer(config, self.parameters))
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
        self.step = 0
        self.bad_steps = 0
        self.preview: Tensor | None = None

    @property
    def global_batch(self) -> int:
        per_process = self.config.train_batch_size * self.config.gradient_accumulation_steps
        return per_process * self.runtime.num_processes

    @property
    def total_steps(self) -> int:
        """Optimiser steps until ``max_train_steps`` or ``num_train_epochs``, whichever comes first."""
        epochs = math.ceil(self.config.num_train_epochs * len(self.prompts) / self.global_batch)
        return min(self.config.max_train_steps, epochs)

    def train_step(self) -> StepMetrics:
        started = time.perf_counter()
        lora.set_dropout(self.backbone.denoiser, True)
        first = self.gradient_window()
        rewards = [self.micro_step(samples, first) for samples in self.micro_batches()]
        self.runtime.average_gradients(self.parameters)
        grad_norm = self.runtime.clip(self.parameters, self.config.max_grad_norm)
        finite = math.isfinite(grad_norm)
        if finite or self.runtime.scales_gradients:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return self.measure(rewards, grad_norm, finite, time.perf_counter() - started)

    def micro_step(self, samples: Sequence[int], first: int) -> RewardOutput:
        """Forward and backward of the videos with these global sample numbers."""
        chosen = draws.training_indices(self.config.seed, samples, len(self.prompts))
        prompts = [self.prompts[index] for index in chosen]
        with self.runtime.autocast():
            z = euler_sample(
                self.backbone.velocity([self.text[self.backbone.caption(p.text())] for p in prompts]),
                self.noise(samples),
                self.backbone.timesteps(len(samples)),
                first_gradient_step=first,
                num_timesteps=self.backbone.num_timesteps,
            )
            frames = self.backbone.decode_frames(z, self.frame_numbers(samples))
            reward = self.reward(frames, [p.reward_text for p in prompts])
        self.runtime.backward(reward.loss.mean() / self.config.gradient_accumulation_steps)
        self.preview = frames.detach() if self.config.is_sample_preview else None
        return RewardOutput(reward.score.detach(), reward.loss.detach(), reward.parts)

    def micro_batches(self) -> Iterator[range]:
        """Global sample numbers of this process's backward passes in the current step.

        The step's samples are the same set however processes and accumulation split them.
        """
        size = self.config.train_batch_size
        for number in range(self.config.gradient_accumulation_steps):
            slot = number * self.runtime.num_processes + self.runtime.rank
            start = self.step * self.global_batch + slot * size
            yield range(start, start + size)

    def gradient_window(self) -> int:
        """First sampling step with a gradient; one draw per optimiser step, the same on every process."""
        generator = draws.generator(self.config.seed, "window", self.step)
        return first_gradient_step(
            self.config.backprop_mode,
            self.backbone.num_sampling_steps,
            lambda n: int(torch.randint(n, (), generator=generator)),
            self.config.backprop_steps,
        )

    def noise(self, samples: Sequence[int]) -> Tensor:
        """[B, C, T, h, w], each video's own."""
        generators = [draws.generator(self.config.seed, "noise", sample) for sample in samples]
        return draws.noise(generators, self.backbone.latent_shape()).to(self.runtime.device)

    def frame_numbers(self, samples: Sequence[int]) -> Tensor:
        """Latent frames [B, F] to decode."""
        generators = [draws.generator(self.config.seed, "frame", sample) for sample in samples]
        frames = self.backbone.latent_shape()[1]
        return choose_frames(self.config.decode_frame, frames, generators).to(self.runtime.device)

    def measure(
        self, rewards: Sequence[RewardOutput], grad_norm: float, finite: bool, seconds: float
    ) -> StepMetrics:
        names = list(rewards[0].parts)
        rows = [torch.stack([r.score, r.loss, *r.parts.values()], dim=1).float() for r in rewards]
        score, loss, *parts = self.runtime.gather(torch.cat(rows)).mean(0).tolist()
        return StepMetrics(score, loss, grad_norm, seconds, dict(zip(names, parts, strict=True)), not finite)

    def fit(self) -> None:
        """Train until the last step; validate, log and save on the way."""
        bar = tqdm(total=self.total_steps, initial=self.step, desc="training", unit="step")
        bar.disable = bar.disable or not self.runtime.is_main or self.config.verbose < 1
        if self.step == 0:
            self.validate()
        while self.step < self.total_steps:
            lr = self.set_learning_rate()
            metrics = self.train_step()
            self.step += 1
            self.guard(metrics)
            self.trackers.log(metrics.scalars(lr), self.step)
            bar.update()
            bar.set_postfix_str(
                f"reward {metrics.reward:.3f}, loss {metrics.loss:.4f}, grad {metrics.grad_norm:.3g}, "
                f"{metrics.seconds:.2f} s/step"
            )
            last = self.step == self.total_steps
            score = self.validate() if last or self.step % self.config.validation_steps == 0 else None
            if last or self.step % self.config.checkpointing_steps == 0:
                self.save(score)
        bar.close()

    def set_learning_rate(self) -> float:
        lr = self.config.lr * lr_factor(self.config, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def guard(self, metrics: StepMetrics) -> None:
        """Count steps in a row whose gradient was not finite; every process sees the same."""
        self.bad_steps = self.bad_steps + 1 if metrics.skipped else 0
        if metrics.skipped:
            samples = [sample for batch in self.micro_batches() for sample in batch]
            logger.warning(
                "step %d was skipped: its gradient is not finite (seed %d, samples %s)",
                self.step, self.config.seed, samples,
            )  # fmt: skip
        if self.bad_steps >= self.config.max_bad_steps:
            raise ValueError(
                f"{self.bad_steps} steps in a row had no finite gradient; lower lr, or set mixed_precision='bf16'"
            )

    def validate(self) -> float:
        """Generate the validation videos with fixed seeds, score them, and return the mean reward."""
        lora.set_dropout(self.backbone.denoiser, False)
        samples = plan_samples(self.val_prompts, 1, self.config.seed)
        own = samples[self.runtime.rank :: self.runtime.num_processes]
        folder = self.folder / "samples" / f"step_{self.step:06d}"
        scores, parts, made = [], [], []
        # A run that went back to an earlier checkpoint makes the videos of a step anew.
        for video in write_videos(self.backbone, self.text, self.config, own, folder, {"step": self.step}):
            output = score_videos(self.reward, video.pixels[None], [video.sample.prompt])
            scores.append(output.score.item())
            parts.append({name: value.item() for name, value in output.parts.items()})
            made.append((str(video.path), video.sample.prompt.reward_text))
        scores, parts, made = map(self.runtime.gather_objects, (scores, parts, made))
        mean = sum(scores) / len(scores)
        averages = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        named = {"reward": mean, **averages}
        self.trackers.log({f"validation/{name}": value for name, value in named.items()}, self.step)
        paths, captions = zip(*made, strict=True)
        self.trackers.log_videos([Path(path) for path in paths], captions, self.step)
        if self.runtime.is_main:
            logger.info("step %d: validation reward %.4f over %d videos", self.step, mean, len(scores))
            self.save_preview(folder)
        return mean

    def save_preview(self, folder: Path) -> None:
        if self.preview is not None:
            from opensora.datasets import save_sample

            for number, frames in enumerate(self.preview.float().cpu()):
                save_sample(frames.transpose(0, 1), str(folder / f"trained_on_{number}"), verbose=False)

    def save(self, score: float | None) -> None:
        """Write a checkpoint and, beside it, the run's current adapter."""
        if self.runtime.is_main:
            state = {
                "step": self.step,
                "bad_steps": self.bad_steps,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.runtime.scaler_state(),
            }
            try:
                model = self.backbone.denoiser
                self.checkpoints.save(self.step, model, state, self.config.to_dict(), score)
                lora.save(model, self.folder / "adapter")
            except OSError as error:
                logger.error("checkpoint of step %d was not saved: %s; training goes on", self.step, error)
        self.runtime.barrier()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, on every process."""
        lora.load(self.backbone.denoiser, lora.read(checkpoint.adapter), str(checkpoint.adapter))
        state = checkpoint.state()
        self.optimizer.load_state_dict(state["optimizer"])
        self.runtime.load_scaler(state["scaler"])
        self.step, self.bad_steps = state["step"], state["bad_steps"]


def build_optimizer(config, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW
    if config.use_AdamW8bit:
        from bitsandbytes.optim import AdamW8bit as kind
    return kind(parameters, lr=config.lr, betas=tuple(config.adam_betas), weight_decay=config.weight_decay)


def lr_factor(config, step: int, total: int) -> float:
    """Learning rate of a step relative to ``lr``: linear warm-up, then constant, or down to 0 by the end."""
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    left = 1 - (step - config.lr_warmup_steps) / max(1, total - config.lr_warmup_steps)
    shapes = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
    return shapes[config.lr_schedule]
