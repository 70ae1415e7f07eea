"""Training by reward gradient: sample, decode, score, and follow the gradient into the adapter.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, F chosen frames, H, W pixels.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from Core.backbones import Backbone
from Core.data.prompts import Prompt
from Core.modules import lora
from Core.rewards import Reward, RewardOutput
from Core.training.checkpoint import Checkpoint, Checkpoints
from Core.training.early_stopping import Course
from Core.training.ema import Ema
from Core.training.metric_logging import Trackers
from Core.training.nan_check import find_fault
from Core.training.progress import LiveView
from Core.training.rollout import Rollout
from Core.training.signals import StopRequest
from Core.training.validation import Validation
from Core.utils import rng as draws
from Core.utils.distributed import Runtime
from Core.utils.timing import Stopwatch
from opensora.datasets import save_sample

logger = logging.getLogger("vader")


@dataclass(frozen=True)
class StepMetrics:
    """One optimiser step, averaged over its global batch.

    skipped: the step was not applied. searching: because fp16's scaler was still looking for its scale, which
    is no fault. stopping: some process was asked to stop. timings: seconds of this process by part of the step.
    """

    reward: float
    loss: float
    grad_norm: float
    parts: dict[str, float]
    skipped: bool
    searching: bool
    stopping: bool
    timings: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.timings.values())

    def scalars(self, lr: float) -> dict[str, float]:
        named = {"reward": self.reward, "loss": self.loss, "grad_norm": self.grad_norm, "lr": lr}
        named |= {"skipped": float(self.skipped), **self.parts, "seconds": self.seconds}
        named["all_reduce_share"] = self.timings["all_reduce"] / self.seconds
        named |= {f"seconds_{part}": seconds for part, seconds in self.timings.items()}
        return {f"train/{name}": value for name, value in named.items()}


class Trainer:
    """Everything a run needs, built and on its device.

    Args:
        identity: settings recorded with each checkpoint, see ``Core.training.resume``.
        text: features [L, D] of every caption of ``prompts``.
        folder: the run folder.
    """

    def __init__(
        self,
        config,
        identity: Mapping[str, object],
        runtime: Runtime,
        backbone: Backbone,
        reward: Reward,
        prompts: Sequence[Prompt],
        text: Mapping[str, Tensor],
        validation: Validation,
        folder: Path,
        trackers: Trackers,
    ):
        self.config, self.identity, self.runtime = config, identity, runtime
        self.backbone, self.reward, self.prompts = backbone, reward, prompts
        self.validation, self.folder, self.trackers = validation, folder, trackers
        self.rollout = Rollout(config, backbone, text)
        self.named_parameters = lora.parameters(backbone.denoiser)
        self.parameters = list(self.named_parameters.values())
        self.optimizer = runtime.prepare(build_optimizer(config, self.parameters))
        self.ema = Ema(self.named_parameters, config.ema_decay) if config.ema_decay else None
        shown = runtime.is_main and config.verbose > 0
        self.live = LiveView(self.total_steps, config.validation_steps, shown)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
        scorers = {"reward": reward, **validation.monitors}
        lower = [name for name, scorer in scorers.items() if not scorer.higher_is_better]
        self.course = Course(config.early_stop, lower)
        self.stop = StopRequest()
        self.step = self.bad_steps = self.skipped_steps = 0
        self.recent_rewards: list[float] = []
        self.preview: Tensor | None = None

    @property
    def total_steps(self) -> int:
        """Optimiser steps until ``max_train_steps`` or ``num_train_epochs``, whichever comes first."""
        batch = global_batch(self.config, self.runtime.num_processes)
        return min(
            self.config.max_train_steps, math.ceil(self.config.num_train_epochs * len(self.prompts) / batch)
        )

    def train_step(self) -> StepMetrics:
        clock = Stopwatch(self.runtime.device)
        lora.set_dropout(self.backbone.denoiser, True, self.config.seed, self.step)
        first = self.rollout.gradient_window(self.step)
        values = torch.cat([self.micro_step(samples, first, clock) for samples in self.micro_batches()])
        fault = find_fault(self.own_samples(), values, self.named_parameters)
        # A gradient that is not finite shows in the norm of the average, on every process.
        flags = [bool(fault and fault.samples), self.stop.requested]
        clock.lap("guards")
        faulty, stopping = self.runtime.average_gradients(self.parameters, flags)
        clock.lap("all_reduce")
        grad_norm = self.runtime.clip(self.parameters, self.config.max_grad_norm)
        searching = self.runtime.apply(self.optimizer, grad_norm, faulty)
        skipped = faulty or not math.isfinite(grad_norm)
        if self.ema and not skipped:
            self.ema.update()
        clock.lap("optimizer")
        if skipped:
            self.report_skip(fault, searching)
        score, loss, *parts = self.runtime.gather(values).mean(0).tolist()
        named = dict(zip(self.part_names, parts, strict=True))
        clock.lap("gather")
        return StepMetrics(score, loss, grad_norm, named, skipped, searching, stopping, clock.seconds())

    def micro_step(self, samples: Sequence[int], first: int, clock: Stopwatch) -> Tensor:
        """Forward and backward of the videos with these global sample numbers.

        Returns:
            [B, 2 + parts]: score, loss and the reward's parts, averaged over ``noise_repeats``.
        """
        draws.seed_globals(self.config.seed, "global", samples[0])
        prompts = self.prompts_of(samples)
        texts = [prompt.reward_text for prompt in prompts]
        share = self.config.gradient_accumulation_steps * self.config.noise_repeats
        values, finished = [], None
        for repeat in range(self.config.noise_repeats):
            with self.runtime.autocast():
                z, distance = self.rollout.sample(prompts, samples, first, repeat, finished, clock)
                clock.lap("gradient_steps")
                frames = self.backbone.decode_frames(z, self.rollout.frame_numbers(samples, repeat))
                clock.lap("decode")
                reward = self.reward(frames, texts)
                loss = reward.loss + self.config.kl_weight * distance
                clock.lap("reward")
            self.runtime.backward(loss.mean() / share)
            clock.lap("backward")
            finished = z.detach() if finished is None else finished
            values.append(self.log_values(reward, loss, distance))
        self.preview = frames.detach() if self.config.is_sample_preview else None
        return torch.stack(values).mean(0)

    def log_values(self, reward: RewardOutput, loss: Tensor, distance: Tensor) -> Tensor:
        """[B, 2 + parts], detached."""
        parts = dict(reward.parts) | ({"base_distance": distance} if self.config.kl_weight else {})
        self.part_names = list(parts)
        return torch.stack([reward.score, loss, *parts.values()], dim=1).detach().float()

    def micro_batches(self) -> Iterator[range]:
        """Global sample numbers of this process's backward passes in the current step.

        The step's samples are the same set however processes and accumulation split them.
        """
        size = self.config.train_batch_size
        for number in range(self.config.gradient_accumulation_steps):
            slot = number * self.runtime.num_processes + self.runtime.rank
            start = self.step * global_batch(self.config, self.runtime.num_processes) + slot * size
            yield range(start, start + size)

    def prompts_of(self, samples: Sequence[int]) -> list[Prompt]:
        chosen = draws.training_indices(self.config.seed, samples, len(self.prompts))
        return [self.prompts[index] for index in chosen]

    def own_samples(self) -> list[tuple[int, str]]:
        """(number, prompt) of this process's samples in the current step."""
        samples = [sample for batch in self.micro_batches() for sample in batch]
        return [(n, p.reward_text) for n, p in zip(samples, self.prompts_of(samples), strict=True)]

    def report_skip(self, fault: object, searching: bool) -> None:
        """Say why a step was not applied, naming what was not finite on whichever process; called by all."""
        if searching:
            logger.info("step %d was skipped while fp16's scaler looks for its scale", self.step + 1)
            return
        faults = self.runtime.gather_objects([str(fault) if fault else ""])
        named = [f"process {rank}: {text}" for rank, text in enumerate(faults) if text]
        if self.runtime.is_main:
            logger.warning(
                "step %d was skipped on all processes, seed %d: not finite: %s",
                self.step + 1, self.config.seed, "; ".join(named) or "the norm of the averaged gradient",
            )  # fmt: skip

    def fit(self) -> None:
        """Train until the last step; validate, log and save on the way."""
        with self.stop, self.live.begin(self.step):
            if self.validation_is_due():
                self.validate()
                if self.step:
                    self.save()
            while not self.finished():
                metrics = self.advance()
                lr = self.optimizer.param_groups[0]["lr"]
                numbers = {"loss": metrics.loss, "grad norm": metrics.grad_norm, "lr": lr}
                self.live.update(self.step, metrics.reward, metrics.timings, numbers)
                if self.after_step(metrics.stopping):
                    logger.warning("stopped after step %d; the same command continues from there", self.step)
                    break

    def advance(self) -> StepMetrics:
        """One optimiser step, counted and logged."""
        lr = self.set_learning_rate()
        metrics = self.train_step()
        self.step += 1
        if not metrics.searching:
            self.bad_steps = self.bad_steps + 1 if metrics.skipped else 0
        self.skipped_steps += metrics.skipped
        self.recent_rewards.append(metrics.reward)
        self.trackers.log(metrics.scalars(lr) | {"train/skipped_steps": self.skipped_steps}, self.step)
        return metrics

    def after_step(self, stopping: bool) -> bool:
        """Validate and save where it is time to; whether the run was asked to stop.

        Raises:
            ValueError: too many steps in a row had no finite gradient; everything is saved.
        """
        exhausted = self.bad_steps >= self.config.max_bad_steps
        if self.validation_is_due() and not stopping:
            self.validate()
            stopping = self.runtime.any(self.stop.requested)
        if stopping or exhausted or self.finished() or self.step % self.config.checkpointing_steps == 0:
            self.save()
        if exhausted:
            raise ValueError(
                f"{self.bad_steps} steps in a row had no finite reward and gradient; the run is saved at step "
                f"{self.step}; lower lr, or set mixed_precision='bf16'"
            )
        return stopping

    def finished(self) -> bool:
        return self.step >= self.total_steps or bool(self.course.stop_reason())

    def set_learning_rate(self) -> float:
        lr = self.config.lr * lr_factor(self.config, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def validation_is_due(self) -> bool:
        """Whether the current step is one to validate at, and has not been."""
        regular = self.step % self.config.validation_steps == 0 or self.step == self.total_steps
        return regular and self.course.last_step < self.step

    def averaged(self):
        """Context in which the adapter is the one to use: its moving average, where there is one."""
        return self.ema.applied() if self.ema else nullcontext()

    def validate(self) -> None:
        """Generate the validation videos, score them, and add the outcome to the run's course."""
        lora.set_dropout(self.backbone.denoiser, False)
        folder = self.folder / "samples" / f"step_{self.step:06d}"
        with self.averaged():
            result = self.validation.run(self.step, folder)
        recent, self.recent_rewards = self.recent_rewards, []
        trained = {"train_reward": sum(recent) / len(recent)} if recent else {}
        self.course.add({"step": self.step, **result.means, **trained})
        if not self.runtime.is_main:
            return
        values = result.means | trained
        if "reward" in values:
            self.live.validated(self.step, values["reward"])
        self.trackers.log({f"validation/{name}": value for name, value in values.items()}, self.step)
        if result.videos:
            paths, captions = zip(*result.videos, strict=True)
            self.trackers.log_videos(paths, captions, self.step)
        self.save_preview(folder)
        listed = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.info("step %d: validation on %d videos: %s", self.step, len(result.videos), listed)
        for warning in self.course.warnings([*self.validation.monitors, "motion", "diversity"]):
            logger.warning("step %d: %s", self.step, warning)
        if reason := self.course.stop_reason():
            logger.warning("step %d: early_stop: %s", self.step, reason)

    def save_preview(self, folder: Path) -> None:
        if self.preview is not None:
            for number, frames in enumerate(self.preview.float().cpu()):
                save_sample(frames.transpose(0, 1), str(folder / f"trained_on_{number}"), verbose=False)

    def save(self) -> None:
        """Write the run's adapter and a checkpoint, after checking that all processes hold the same."""
        self.refuse_divergence()
        if self.runtime.is_main:
            try:
                with self.averaged():
                    lora.save(self.backbone.denoiser, self.folder / "adapter")
                score = self.validation_score()
                model = self.backbone.denoiser
                self.checkpoints.save(self.step, model, self.state(), dict(self.identity), score)
            except OSError as error:
                logger.error(
                    "checkpoint of step %d was not saved: %s; earlier ones are untouched, and training goes on",
                    self.step, error,
                )  # fmt: skip
        self.runtime.barrier()

    def validation_score(self) -> float | None:
        """The current step's validation reward, higher being better; None without a validation."""
        good = self.course.goodness("reward")
        return good[-1] if good and self.course.last_step == self.step else None

    def refuse_divergence(self) -> None:
        """Raise ValueError where the processes hold different adapters."""
        own = [*self.parameters, *(self.ema.average.values() if self.ema else ())]
        hashes = self.runtime.gather_objects([lora.digest(own)])
        if len(set(hashes)) > 1:
            listed = ", ".join(f"process {rank} {digest[:8]}" for rank, digest in enumerate(hashes))
            raise ValueError(
                f"the adapter differs between processes at step {self.step} ({listed}); nothing was saved: check "
                "that all machines run the same versions and their memory is sound, then start again to resume "
                "from the last checkpoint"
            )

    def state(self) -> dict:
        """All that continuing needs beside the adapter and the configuration.

        Random draws are functions of seed, step and sample number, so these are the whole random state; the
        learning rate is a function of step and configuration.
        """
        return {
            "step": self.step,
            "rng": {"seed": self.config.seed, "next_sample": next(self.micro_batches()).start},
            # A run that continues after too many bad steps may try as many again.
            "bad_steps": self.bad_steps % self.config.max_bad_steps,
            "skipped_steps": self.skipped_steps,
            "recent_rewards": self.recent_rewards,
            "course": self.course.results,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.runtime.scaler_state(),
            "ema": self.ema.state() if self.ema else None,
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, on every process."""
        lora.load(self.backbone.denoiser, lora.read(checkpoint.adapter), str(checkpoint.adapter))
        state = checkpoint.state()
        self.optimizer.load_state_dict(state["optimizer"])
        self.runtime.load_scaler(state["scaler"])
        if self.ema:
            self.ema.load(state["ema"])
        self.course.results = state["course"]
        self.step, self.bad_steps = state["step"], state["bad_steps"]
        self.skipped_steps, self.recent_rewards = state["skipped_steps"], state["recent_rewards"]


def global_batch(config, num_processes: int) -> int:
    """Samples of one optimiser step, over all processes."""
    return config.train_batch_size * config.gradient_accumulation_steps * num_processes


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
