"""A training step of a configuration on tensors without content: peak bytes and work of each phase.

The step is the trainer's own, on networks of full size; nothing is read, and no memory is taken.
"""

import dataclasses
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.initialization import no_init_weights

from Core.backbones import EncodedPrompt, Features, Prompt
from Core.config import Config, ConfigError
from Core.config.checks import machine_errors
from Core.estimate.card_kernels import CudaArithmetic, attention_workspace
from Core.estimate.live_bytes import LiveBytes, storages_in
from Core.estimate.operations import Work, WorkCounter, operations_in
from Core.estimate.scorers import joined, real_scorers
from Core.estimate.stand_ins import AgreeingProcesses, absent_processes
from Core.estimate.values import tensors_without_content, without_content
from Core.estimate.weightless import weightless_backbone
from Core.evaluation.metrics import score_videos
from Core.generation.generate import generate
from Core.generation.manifest import plan_samples
from Core.modules import lora
from Core.rewards import Reward
from Core.training.metric_logging import Trackers
from Core.training.setup import adapt_for_training, scorer_dtype
from Core.training.trainer import Trainer
from Core.training.validation import Validation
from Core.utils import rng
from Core.utils.timing import Stopwatch

# Phases of the backward passes of a step, which all do the same.
OF_MICRO_STEPS = ("prefix", "gradient_steps", "decode", "reward", "backward")
OUTSIDE_STEPS = ("text", "load", "validation")
ENCODE_BATCH = 8
NO_FOLDER = Path("/nonexistent")


@dataclass
class Phase:
    """Peak bytes of everything alive, and the work that was done."""

    peak: int = 0
    work: Counter[Work] = field(default_factory=Counter)

    @property
    def operations(self) -> float:
        return operations_in(self.work)


@dataclass(frozen=True)
class FakeRun:
    """What a run does, phase by phase.

    phases: ``text``, ``load``, those of a training step by their names in ``metrics.csv``, and ``validation``, which is
    one batch of videos with their scores. networks: bytes that lie on the device throughout training.
    """

    phases: dict[str, Phase]
    networks: int

    @property
    def step(self) -> dict[str, Phase]:
        """The phases of a training step."""
        return {name: phase for name, phase in self.phases.items() if name not in OUTSIDE_STEPS}

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases.values())

    @property
    def fullest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda name: self.phases[name].peak)


class Meter(TorchDispatchMode):
    """Live bytes and work, whose laps end together; one mode for both, since each takes time at every operator."""

    def __init__(self, live: LiveBytes, work: WorkCounter):
        super().__init__()
        self.live, self.work = live, work

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = storages_in((args, kwargs))
        out = func(*args, **kwargs)
        self.live.note(func, args, given, out)
        self.work.note(func, args, kwargs, out)
        return out

    def lap(self, name: str) -> None:
        gc.collect()
        self.live.lap(name)
        self.work.lap(name)

    def stopwatch(self, device: torch.device) -> Stopwatch:
        meter = self

        class Metered(Stopwatch):
            def lap(self, name: str) -> None:
                super().lap(name)
                meter.lap(name)

        return Metered(device)

    def phases(self) -> dict[str, Phase]:
        return {name: Phase(peak, self.work.phases[name]) for name, peak in self.live.phases.items()}


def fake_run(
    config: Config,
    processes: int = 1,
    on_card: bool = True,
    whole: bool = False,
    validate: bool = True,
    tell: Callable[[str], None] = lambda phase: None,
) -> FakeRun:
    """Build a run and take a training step and one batch of a validation.

    Args:
        processes: of the run; each holds and does the same.
        on_card: what a CUDA card takes; else this machine's CPU.
        whole: run every backward pass of the step; else one, whose work is counted for all.
        validate: also make and score one batch of validation videos.
        tell: called with what begins.

    Raises:
        ValueError: sizes that are not known, or code that reads what tensors without content do not have.
    """
    if errors := machine_errors(config, processes):
        raise ConfigError(errors)
    scorers = real_scorers(config.reward.reward_fn, config.reward.arguments)
    with counting(processes, on_card) as (mode, meter):
        distributed = AgreeingProcesses(config.optimizer.mixed_precision, processes)
        built, repeats = (config, 1) if whole else shortened(config)
        backbone = weightless_backbone(built, meter.live, meter.work)
        backbone.mesh = distributed.mesh if config.models.shard_frozen else None
        gc.freeze()
        tell("text")
        with meter.live.elsewhere() if config.models.text_encoding == "cpu" else nullcontext():
            prompts, validation_prompts = encode_used(built, backbone, processes)
        gc.collect()
        meter.lap("text")
        tell("load")
        with no_init_weights():
            backbone.load()
        fakes = fake_scorers(scorers, mode, meter.live)
        trainer = assembled(built, distributed, backbone, fakes, prompts, validation_prompts)
        begin_optimizer(trainer, on_card)
        if repeats == 1:
            trainer.optimizer.zero_grad()  # else those of the backward passes before are there
        gc.collect()
        networks = meter.live.now
        meter.lap("load")
        tell("step")
        gc.freeze()  # what stands is not looked through again at every collection
        trainer.stopwatch = meter.stopwatch
        trainer.train_step()
        if not trainer.adapter_took_part:
            raise ValueError(
                "no evaluation of the estimated step reached the adapter; train_experts names the expert of other "
                "timesteps"
            )
        if validate:
            tell("validation")
            make_videos(built, backbone, trainer.objective.reward, validation_prompts)
            meter.lap("validation")
        gc.unfreeze()
    return FakeRun(repeated(meter.phases(), repeats), networks)


@contextmanager
def counting(processes: int, on_card: bool) -> Iterator[tuple[FakeTensorMode, Meter]]:
    """Within this context tensors have no content, and what is done and what lives is counted."""
    live = LiveBytes(attention_workspace if on_card else None)
    with (
        absent_processes(processes),
        tensors_without_content() as mode,
        Meter(live, WorkCounter()) as meter,
        live.following_resizes(),
        CudaArithmetic() if on_card else nullcontext(),
    ):
        yield mode, meter


def fake_scorers(scorers: Mapping[str, Any], mode: Any, live: LiveBytes) -> dict[str, Any]:
    """The same scorers without content, whose bytes count; None where there is no real one."""
    fakes = {name: part and without_content(mode, part) for name, part in scorers.items()}
    for part in filter(None, fakes.values()):
        live.add(part)
    return fakes


def assembled(
    config: Config,
    distributed: AgreeingProcesses,
    backbone: Any,
    scorers: Mapping[str, Any],
    prompts: Sequence[EncodedPrompt],
    validation_prompts: list[EncodedPrompt],
) -> Trainer:
    """The trainer of networks without content, as it is before its first step."""
    dtype = scorer_dtype(backbone.dtype, config.optimizer.mixed_precision)
    reward = joined(config.reward.reward_fn, scorers, dtype)
    adapt_for_training(config, backbone)
    validation = Validation(config, distributed, backbone, reward, {}, validation_prompts)
    trainer = Trainer(config, {}, distributed, backbone, reward, prompts, validation, NO_FOLDER, Trackers({}))
    fill_text_caches(trainer, reward)
    return trainer


def repeated(phases: dict[str, Phase], times: int) -> dict[str, Phase]:
    """Phases of a step with so many backward passes, from those of one."""
    for name in set(OF_MICRO_STEPS) & set(phases):
        work = phases[name].work
        phases[name].work = Counter({one: times * count for one, count in work.items()})
    return phases


def shortened(config: Config) -> tuple[Config, int]:
    """The run with one backward pass a step, and how many of the run's that stands for.

    An objective that needs groups of videos keeps all of them.
    """
    grouped, asked = config.objective.videos_per_prompt > 1, config.optimizer.gradient_accumulation_steps
    count = asked if grouped else 1
    run = dataclasses.replace(
        config,
        models=dataclasses.replace(config.models, compile_blocks=False),
        optimizer=dataclasses.replace(config.optimizer, gradient_accumulation_steps=count),
    )
    return run, asked // count


def encode_used(
    config: Config, backbone: Any, processes: int
) -> tuple[Sequence[EncodedPrompt], list[EncodedPrompt]]:
    """The training prompts, of which those of the first step have features, and those of a batch of the validation."""
    prompts = config.prompt_list
    samples = range(config.optimizer.global_batch(processes))
    groups = [sample // config.objective.videos_per_prompt for sample in samples]
    chosen = set(rng.training_indices(config.run.seed, groups, len(prompts)))
    validated = config.validation_prompt_list[: config.validation.val_batch_size]
    wanted = [*(prompts[i] for i in sorted(chosen)), *validated]
    captions = list(dict.fromkeys(backbone.caption(text) for prompt in wanted for text in prompt.texts))
    negative = backbone.negative_caption
    captions += [] if negative is None else [negative]
    encoder, features = backbone.text_encoder(), dict[str, Features]()
    for start in range(0, len(captions), ENCODE_BATCH):
        batch = captions[start : start + ENCODE_BATCH]
        features |= dict(zip(batch, encoder.encode(batch), strict=True))
    if negative is not None:
        backbone.negative = features[negative]

    def encoded(prompt: Prompt) -> EncodedPrompt:
        return EncodedPrompt(prompt, tuple(features[backbone.caption(text)] for text in prompt.texts))

    first = encoded(wanted[0])
    every = [encoded(prompt) if i in chosen else first for i, prompt in enumerate(prompts)]
    return every, [encoded(prompt) for prompt in validated]


def begin_optimizer(trainer: Trainer, on_card: bool) -> None:
    """Make the optimiser's state, which is there from the second step on."""
    if on_card and isinstance(trainer.optimizer, torch.optim.AdamW):
        for group in trainer.optimizer.param_groups:
            group["foreach"] = True  # PyTorch's choice on a card
    for parameter in trainer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()


def fill_text_caches(trainer: Trainer, reward: Reward) -> None:
    """Let scorers see the step's prompts, as they keep what they made of a text before."""
    video, objective = trainer.backbone.video, trainer.objective
    count = objective.count_scored_frames(objective.settings, trainer.backbone.latent_shape()[1], video)
    for samples in trainer.micro_batches():
        texts = [encoded.prompt.reward_text for encoded in trainer.prompts_of(samples)]
        with torch.no_grad():
            reward(torch.zeros(len(texts), count, 3, video.height, video.width), texts)


def make_videos(config: Config, backbone: Any, reward: Any, prompts: Sequence[EncodedPrompt]) -> None:
    """One batch of videos, and the score of the first."""
    lora.set_dropout(backbone.denoiser, False)
    samples = plan_samples([encoded.prompt for encoded in prompts], 1, config.run.seed)
    videos = generate(backbone, samples, prompts)
    score_videos(reward, videos[:1], [prompts[0].prompt], backbone.video.fps)
