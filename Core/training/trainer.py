"""The training loop: steps, accumulation, guards, validation and saving.

What happens between a batch of prompts and a loss is the objective's, see ``Core.training.objectives``.

Axes: B batch.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from Core.backbones import Backbone, EncodedPrompt
from Core.config import Config
from Core.config.schema import ALWAYS_MONITORED
from Core.data.video import save_video
from Core.modules import lora
from Core.modules.ema import Ema
from Core.rewards import Reward, RewardOutput
from Core.training.checkpoint import Checkpoint, Checkpoints, refuse_divergence
from Core.training.early_stopping import ValidationHistory
from Core.training.metric_logging import StepMetrics, Trackers
from Core.training.nan_check import find_fault, report_skip
from Core.training.optimizer import build_optimizer, set_learning_rate
from Core.training.progress import ProgressPanel
from Core.training.signals import StopRequest
from Core.training.validation import Validation, ValidationResult
from Core.utils import rng
from Core.utils.distributed import Distributed
from Core.utils.timing import Stopwatch
from Core.utils.words import counted

logger = logging.getLogger("vader")


def total_steps(config: Config, prompts: int, global_batch: int) -> int:
    """Optimiser steps of a run with so many prompts, until ``max_train_steps`` or ``num_train_epochs``."""
    videos = config.optimizer.num_train_epochs * prompts * config.objective.videos_per_prompt
    return min(config.optimizer.max_train_steps, math.ceil(videos / global_batch))


class Trainer:
    """Everything a run needs, built and on its device.

    Args:
        identity: settings recorded with each checkpoint, see ``Core.training.resume``.
        folder: the run folder.
    """

    def __init__(
        self,
        config: Config,
        identity: Mapping[str, object],
        distributed: Distributed,
        backbone: Backbone,
        reward: Reward,
        prompts: Sequence[EncodedPrompt],
        validation: Validation,
        folder: Path,
        trackers: Trackers,
    ):
        self.config, self.identity, self.distributed = config, identity, distributed
        self.backbone, self.prompts, self.folder = backbone, prompts, folder
        self.validation, self.trackers, self.seed = validation, trackers, config.run.seed
        self.objective = config.objective_class(config.objective, backbone, reward, self.seed)
        self.named_parameters = lora.parameters(backbone.denoiser)
        self.parameters = list(self.named_parameters.values())
        self.optimizer = distributed.prepare(build_optimizer(config.optimizer, self.parameters))
        decay = config.optimizer.ema_decay
        self.ema = Ema(self.named_parameters, decay) if decay else None
        shown = distributed.is_main and config.run.verbose > 0
        self.progress = ProgressPanel(self.total_steps, config.validation.validation_steps, shown)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.run.keep_checkpoints)
        scorers = {"reward": reward, **validation.monitors}
        lower = [name for name, scorer in scorers.items() if not scorer.higher_is_better]
        self.history = ValidationHistory(config.validation.early_stop, lower)
        self.stop = StopRequest()
        self.step = self.bad_steps = self.skipped_steps = 0
        self.still_steps = 0  # steps in a row whose gradient was exactly zero
        self.adapter_took_part = False  # in the last step, on any process
        self.idle_steps = 0  # steps in a row in which it did not
        self.recent_rewards: list[float] = []
        self.save_fault = ""  # why the last save failed
        self.stopwatch: Callable[[torch.device], Stopwatch] = Stopwatch

    @property
    def total_steps(self) -> int:
        """Optimiser steps until ``max_train_steps`` or ``num_train_epochs``, whichever comes first."""
        batch = self.config.optimizer.global_batch(self.distributed.num_processes)
        return total_steps(self.config, len(self.prompts), batch)

    def train_step(self) -> StepMetrics:
        timer = self.stopwatch(self.distributed.device)
        lora.set_dropout(self.backbone.denoiser, True, self.seed, self.step)
        self.objective.begin_step(self.step)
        self.adapter_took_part = False
        batches = [(self.prompts_of(samples), samples) for samples in self.micro_batches()]
        with self.distributed.autocast():
            self.objective.collect(batches, self.distributed.gather, timer)
        updates = []
        for number in range(self.objective.updates_per_step):
            self.objective.begin_update(number)
            updates.append(self.update(timer))
        self.objective.end_step()
        return StepMetrics.mean(updates, timer.seconds())

    def update(self, timer: Stopwatch) -> StepMetrics:
        """Backward passes of all micro batches, and the optimiser step that they make."""
        # A NaN then ends the run, and names its operation.
        with torch.autograd.set_detect_anomaly(self.config.run.debug):
            values = torch.cat([self.micro_step(samples, timer) for samples in self.micro_batches()])
        fault = find_fault(self.local_samples(), values, self.named_parameters)
        # A gradient that is not finite shows in the norm of the average, on every process.
        flags = [bool(fault and fault.samples), self.stop.requested, self.adapter_took_part]
        timer.lap("guards")
        faulty, stopping, self.adapter_took_part = self.distributed.average_gradients(self.parameters, flags)
        timer.lap("all_reduce")
        grad_norm = self.distributed.clip(self.parameters, self.config.optimizer.max_grad_norm)
        calibrating = self.distributed.optimizer_step(self.optimizer, grad_norm, faulty)
        skipped = faulty or not math.isfinite(grad_norm)
        if self.ema and not skipped:
            self.ema.update()
        timer.lap("optimizer")
        if skipped:
            report_skip(self.distributed, self.step, self.seed, fault, calibrating)
        score, loss, *parts = self.distributed.gather(values).mean(0).tolist()
        named = dict(zip(self.part_names, parts, strict=True))
        timer.lap("gather")
        return StepMetrics(score, loss, grad_norm, named, skipped, calibrating, stopping)

    def micro_step(self, samples: Sequence[int], timer: Stopwatch) -> Tensor:
        """Forward and backward of the videos with these global sample numbers.

        Returns:
            [B, 2 + parts]: score, loss and what the objective logs.
        """
        rng.seed_globals(self.seed, "global", samples[0])
        terms = self.objective.losses(self.prompts_of(samples), samples, timer)
        values = []
        while (output := self.next_term(terms)) is not None:
            if output.loss.requires_grad or not self.backbone.partly_adapted:
                self.distributed.backward(
                    output.loss.mean() / self.config.optimizer.gradient_accumulation_steps
                )
                self.adapter_took_part = True
            timer.lap("backward")
            self.part_names = list(output.parts)
            columns = torch.stack([output.score, output.loss, *output.parts.values()], dim=1)
            values.append(columns.detach().float())
        total = torch.stack(values).mean(0)
        total[:, 1] *= len(values)  # losses add up
        return total

    def next_term(self, terms: Iterator[RewardOutput]) -> RewardOutput | None:
        """The forward pass of the next term, under autocast as no backward pass should be; None after the last."""
        with self.distributed.autocast():
            return next(terms, None)

    def micro_batches(self) -> Iterator[range]:
        """Global sample numbers of this process's backward passes in the current step.

        The step's samples are the same set however processes and accumulation split them.
        """
        settings, processes = self.config.optimizer, self.distributed.num_processes
        size = settings.train_batch_size
        for number in range(settings.gradient_accumulation_steps):
            slot = number * processes + self.distributed.rank
            start = self.step * settings.global_batch(processes) + slot * size
            yield range(start, start + size)

    def prompts_of(self, samples: Sequence[int]) -> list[EncodedPrompt]:
        groups = [sample // self.objective.group_size for sample in samples]
        return [self.prompts[i] for i in rng.training_indices(self.seed, groups, len(self.prompts))]

    def local_samples(self) -> list[tuple[int, str]]:
        """(number, prompt) of this process's samples in the current step."""
        samples = [sample for batch in self.micro_batches() for sample in batch]
        prompts = self.prompts_of(samples)
        return [(n, p.prompt.reward_text) for n, p in zip(samples, prompts, strict=True)]

    def fit(self) -> None:
        """Train until the last step; validate, log and save on the way."""
        stopped = False
        with self.stop, self.progress.begin(self.step):
            if self.validation_is_due():
                self.validate()
                if self.step:
                    self.save()
            elif self.finished():
                # It may be missing, or another step's: the command is repeated for it.
                self.save(checkpoint=False)
            while not self.finished():
                metrics = self.advance()
                lr = self.optimizer.param_groups[0]["lr"]
                numbers = {"loss": metrics.loss, "grad norm": metrics.grad_norm, "lr": lr}
                self.progress.update(self.step, metrics.reward, metrics.timings, numbers)
                if stopped := self.after_step(metrics.stopping):
                    break
        if self.save_fault:
            raise ValueError(
                f"step {self.step} could not be saved: {self.save_fault}; make room and repeat the command, which "
                "continues from the last checkpoint"
            )
        if stopped:
            logger.warning("stopped after step %d; the same command continues from there", self.step)

    def advance(self) -> StepMetrics:
        """One optimiser step, counted and logged."""
        lr = set_learning_rate(self.optimizer, self.config.optimizer, self.step, self.total_steps)
        metrics = self.train_step()
        self.step += 1
        if not metrics.scaler_calibrating:
            self.bad_steps = self.bad_steps + 1 if metrics.skipped else 0
        self.still_steps = self.still_steps + 1 if metrics.grad_norm == 0 else 0
        self.idle_steps = 0 if self.adapter_took_part else self.idle_steps + 1
        self.skipped_steps += metrics.skipped
        self.recent_rewards.append(metrics.reward)
        self.trackers.log(metrics.scalars(lr) | {"train/skipped_steps": self.skipped_steps}, self.step)
        return metrics

    def after_step(self, stopping: bool) -> bool:
        """Validate and save where it is time to; whether the run was asked to stop.

        Raises:
            ValueError: too many steps in a row had no finite gradient, or none at all; everything is saved.
        """
        exhausted = self.why_hopeless()
        if self.validation_is_due() and not stopping:
            self.validate()
            stopping = self.distributed.any(self.stop.requested)
        regular = self.step % self.config.run.checkpointing_steps == 0
        if stopping or exhausted or self.finished() or regular:
            self.save()
        if exhausted:
            kept = f"not saved ({self.save_fault})" if self.save_fault else "saved"
            reason, advice = exhausted
            raise ValueError(f"{reason}; the run is {kept} at step {self.step}; {advice}")
        return stopping

    def why_hopeless(self) -> tuple[str, str] | None:
        """Why further steps would not train, and what to change; None while they may."""
        limit = self.config.optimizer.max_bad_steps
        if self.bad_steps >= limit:
            reason = f"{self.bad_steps} steps in a row had no finite reward and gradient"
            return reason, "lower lr, or set mixed_precision='bf16'"
        if self.idle_steps >= limit:
            reason = f"the adapter took no part in {self.idle_steps} steps in a row"
            advice = "train_experts names the expert of other timesteps: change it, or raise backprop_steps"
            return reason, advice
        if self.still_steps >= limit and self.objective.needs_reward_gradient:
            reason = f"the gradient of {self.still_steps} steps in a row was exactly zero"
            advice = (
                f"the loss of reward_fn={self.config.reward.reward_fn!r} does not depend on the frames there: look for "
                "rounding, thresholds and targets that have been reached"
            )
            return reason, advice
        return None

    def finished(self) -> bool:
        return self.step >= self.total_steps or bool(self.history.stop_reason())

    def validation_is_due(self) -> bool:
        """Whether the current step is one to validate at, and has not been."""
        regular = self.step % self.config.validation.validation_steps == 0 or self.step == self.total_steps
        return regular and self.history.last_step < self.step

    def averaged(self):
        """Context in which the adapter is the one to use: its moving average, where there is one."""
        return self.ema.applied() if self.ema else nullcontext()

    def validate(self) -> None:
        """Generate the validation videos, score them, and add the outcome to the run's history."""
        lora.set_dropout(self.backbone.denoiser, False)
        folder = self.folder / "samples" / f"step_{self.step:06d}"
        with self.averaged(), self.progress.doing(f"validating at step {self.step}"):
            result = self.validation.run(self.step, folder)
        recent, self.recent_rewards = self.recent_rewards, []
        trained = {"train_reward": sum(recent) / len(recent)} if recent else {}
        values = result.means | trained
        self.history.add({"step": self.step, **values})
        if self.distributed.is_main:
            self.report_validation(result, values)
            self.save_preview(folder)

    def report_validation(self, result: ValidationResult, values: Mapping[str, float]) -> None:
        self.progress.validated(self.step, values["reward"])
        self.trackers.log({f"validation/{name}": value for name, value in values.items()}, self.step)
        if result.videos:
            paths, captions = zip(*result.videos, strict=True)
            self.trackers.log_videos(paths, captions, self.step)
        listed = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        videos = counted(len(result.videos), "video")
        logger.info("step %d: validation on %s: %s", self.step, videos, listed)
        for warning in self.history.warnings([*self.validation.monitors, *ALWAYS_MONITORED]):
            logger.warning("step %d: %s", self.step, warning)
        if reason := self.history.stop_reason():
            logger.warning("step %d: early_stop: %s", self.step, reason)

    def save_preview(self, folder: Path) -> None:
        if self.config.validation.is_sample_preview and self.objective.frames is not None:
            try:
                for number, frames in enumerate(self.objective.frames.float().cpu()):
                    save_video(frames.transpose(0, 1), folder / f"trained_on_{number}", fps=8)
            except OSError as error:
                logger.error("the preview of step %d was not saved: %s; training goes on", self.step, error)

    def save(self, checkpoint: bool = True) -> None:
        """Write a checkpoint and the run's adapter, after checking that all processes hold the same."""
        averages = [*(self.ema.average.values() if self.ema else ()), *self.objective.tensors()]
        refuse_divergence(self.distributed, self.step, [*self.parameters, *averages])
        fault = ""
        if self.distributed.is_main:
            # The adapter last: a folder that was deleted meanwhile holds it again.
            for write in [self.write_checkpoint] * checkpoint + [self.write_adapter]:
                try:
                    write()
                except OSError as error:
                    fault = str(error)
                    logger.error(
                        "step %d was not saved: %s; earlier checkpoints are untouched", self.step, error
                    )
        self.save_fault = self.distributed.broadcast(fault)

    def write_checkpoint(self) -> None:
        score, settings = self.history.score_at(self.step), dict(self.identity)
        self.checkpoints.save(self.step, self.backbone.denoiser, self.state(), settings, score)

    def write_adapter(self) -> None:
        with self.averaged():
            lora.save(self.backbone.denoiser, self.folder / "adapter")

    def state(self) -> dict:
        """All that continuing needs beside the adapter and the configuration.

        Random draws are functions of seed, step and sample number, so these are the whole random state; the
        learning rate is a function of step and configuration.
        """
        return {
            "step": self.step,
            "rng": {"seed": self.seed, "next_sample": next(self.micro_batches()).start},
            # A run that continues after too many bad steps may try as many again.
            "bad_steps": self.bad_steps % self.config.optimizer.max_bad_steps,
            "skipped_steps": self.skipped_steps,
            "still_steps": self.still_steps % self.config.optimizer.max_bad_steps,
            "idle_steps": self.idle_steps % self.config.optimizer.max_bad_steps,
            "recent_rewards": self.recent_rewards,
            "course": self.history.results,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.distributed.scaler_state(),
            "ema": self.ema.state() if self.ema else None,
            "objective": dict(self.objective.state()),
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, on every process."""
        lora.load(self.backbone.denoiser, lora.read(checkpoint.adapter), str(checkpoint.adapter))
        state = checkpoint.state()
        self.optimizer.load_state_dict(state["optimizer"])
        self.distributed.load_scaler(state["scaler"])
        if self.ema:
            self.ema.load(state["ema"])
        if "objective" in state:  # absent from checkpoints of earlier versions, whose objective had none
            self.objective.load(state["objective"])
        self.history.results = state["course"]
        self.step, self.bad_steps = state["step"], state["bad_steps"]
        self.skipped_steps, self.recent_rewards = state["skipped_steps"], state["recent_rewards"]
        # Not in checkpoints of earlier versions.
        self.still_steps, self.idle_steps = state.get("still_steps", 0), state.get("idle_steps", 0)
