"""Training, from a configuration to a finished run: build everything, continue or begin, fit."""

import itertools
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from Core.backbones import Backbone, Prompt
from Core.build import build_backbone, commits_of_weights, scorers_of
from Core.config import Config, ConfigError
from Core.modules import lora
from Core.modules.offloading import offload_activations
from Core.modules.recompute import recompute_parts
from Core.rewards import Reward, build_reward, prompt_errors
from Core.rewards.user_files import try_scorer
from Core.training.metric_logging import Trackers, build_trackers
from Core.training.objectives.base import no_gradient_sentence
from Core.training.optimizer import state_bytes
from Core.training.resume import claim_folder, find_checkpoint, identity
from Core.training.trainer import Trainer, total_steps
from Core.training.validation import Validation
from Core.utils import rng
from Core.utils.distributed import Distributed
from Core.utils.environment import record_environment

logger = logging.getLogger("vader")
TRIED_VIDEOS = 2  # enough to tell a score per video from one for all


def train(config: Config, distributed: Distributed, folder: Path) -> None:
    """Train an adapter in the run folder ``folder``, from its newest checkpoint if ``resume`` says so."""
    trainer = build_trainer(config, distributed, folder)
    try:
        refuse_small_disk(trainer)
        trainer.fit()
    finally:
        trainer.trackers.close()
    logger.info("the adapter is in %s", folder / "adapter")
    if distributed.is_main:
        report(folder)


def build_trainer(config: Config, distributed: Distributed, folder: Path) -> Trainer:
    """Everything ``train`` needs, where the run in ``folder`` stands."""
    batch = config.optimizer.global_batch(distributed.num_processes)
    if errors := config.objective_class.batch_errors(config.objective, batch):
        raise ConfigError(errors)
    refuse_unscorable(config, distributed)
    prompts, val_prompts = config.prompt_list, config.validation_prompt_list
    found = find_checkpoint(config, folder, prompts, batch) if distributed.is_main else None
    checkpoint = distributed.broadcast(found)
    used = [*used_prompts(config, prompts, batch), *val_prompts]
    backbone, encoded = build_backbone(config, distributed, [*prompts, *val_prompts], used)
    reward, monitors = build_scorers(config, distributed, backbone)
    adapt_for_training(config, backbone)
    if distributed.is_main:
        claim_folder(config, folder, checkpoint)
        record_environment(folder, commits_of_weights(config, backbone))
    last_row = checkpoint.step if checkpoint else -1
    trackers = build_trackers(config, folder, last_row) if distributed.is_main else Trackers({})
    validation = Validation(config, distributed, backbone, reward, monitors, encoded[len(prompts) :])
    trainer = Trainer(
        config, identity(config, prompts, batch), distributed, backbone, reward, encoded[: len(prompts)],
        validation, folder, trackers,
    )  # fmt: skip
    try_user_scorers(trainer, reward, monitors)
    if checkpoint:
        trainer.resume(checkpoint)
        logger.info("continuing from %s", checkpoint.folder)
    return trainer


def refuse_small_disk(trainer: Trainer) -> None:
    """Raise ConfigError where the run folder has no room for the adapter and the checkpoints to come."""
    refusal = ""
    if trainer.distributed.is_main:
        adapter, checkpoint = saved_sizes(trainer)
        steps, saves_every = trainer.total_steps - trainer.step, trainer.config.run.checkpointing_steps
        needed = adapter + trainer.checkpoints.room_needed(checkpoint, math.ceil(steps / saves_every))
        free = shutil.disk_usage(trainer.folder).free
        if free < needed:
            refusal = (
                f"{str(trainer.folder)!r} has {free:,} bytes free, and the run needs {needed:,} for the adapter and "
                f"checkpoints of {checkpoint:,} each; make room, lower keep_checkpoints, or choose another project_dir"
            )
    if refusal := trainer.distributed.broadcast(refusal):
        raise ConfigError([refusal])


def saved_sizes(trainer: Trainer) -> tuple[int, int]:
    """Bytes of the adapter, and of a checkpoint: adapter, optimiser, moving average and the objective's own tensors."""
    adapter = sum(p.numel() * p.element_size() for p in trainer.parameters)
    moments = state_bytes(trainer.config.optimizer, trainer.parameters)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in trainer.objective.tensors())
    return adapter, adapter + moments + kept + (adapter if trainer.ema else 0)


def used_prompts(config: Config, prompts: Sequence[Prompt], global_batch: int) -> Sequence[Prompt]:
    """Those that the run trains on: of a long list, its steps may not reach all."""
    group = config.objective.videos_per_prompt
    samples = total_steps(config, len(prompts), global_batch) * global_batch
    if samples >= len(prompts) * group:
        return prompts
    drawn = range(-(-samples // group))
    return [prompts[i] for i in rng.training_indices(config.run.seed, drawn, len(prompts))]


def report(folder: Path) -> None:
    """Write the run's page; whatever goes wrong with it costs a message, never the finished run."""
    from Core.evaluation.report import write_report

    try:
        logger.info("the report is %s", write_report(folder))
    except Exception as error:
        logger.warning("no report: %s: %s; `vader report` writes it", type(error).__name__, error)


def refuse_unscorable(config: Config, distributed: Distributed) -> None:
    """Raise ConfigError, naming the prompts that the trained reward or a monitor cannot score."""
    texts = [prompt.reward_text for prompt in [*config.prompt_list, *config.validation_prompt_list]]
    errors: list[str] = []
    if distributed.is_main:
        for name, given in scorers_of(config):
            with suppress(FileNotFoundError):  # reported later, with all other weights that are missing
                errors += prompt_errors(name, given, texts)
    if errors := distributed.broadcast(errors):
        raise ConfigError(list(dict.fromkeys(errors)))


def build_scorers(
    config: Config, distributed: Distributed, backbone: Backbone
) -> tuple[Reward, dict[str, Reward]]:
    """The trained reward and the monitors by name."""
    placed: dict[str, Any] = {
        "device": distributed.device,
        "dtype": scorer_dtype(backbone.dtype, config.optimizer.mixed_precision),
        "mesh": backbone.mesh,
    }
    reward = build_reward(config.reward.reward_fn, config.reward.arguments, **placed)
    arguments = config.validation.monitor_args
    monitors = {
        name: build_reward(name, arguments.get(name), **placed) for name in config.validation.monitors
    }
    return reward, monitors


def try_user_scorers(trainer: Trainer, reward: Reward, monitors: Mapping[str, Reward]) -> None:
    """Have scorers from users' files score noise once, so that their faults show before the first step.

    Raises:
        ValueError: one fails, or lacks the gradient that the objective needs.
    """
    video, objective = trainer.backbone.video, trainer.objective
    encoded = trainer.prompts_of(range(min(TRIED_VIDEOS, trainer.config.optimizer.train_batch_size)))
    prompts = [one.prompt.reward_text for one in encoded]
    for scorer in user_scorers(reward):
        count = objective.count_scored_frames(objective.settings, trainer.backbone.latent_shape()[1], video)
        shape = (len(prompts), count, 3, video.height, video.width)
        frames = torch.rand(shape, generator=rng.generator(0, "trial")).to(trainer.distributed.device)
        if not try_scorer(scorer, frames * 2 - 1, prompts, objective.needs_reward_gradient):
            raise ValueError(no_gradient_sentence(f"reward {scorer.origin!r}"))
    for scorer in itertools.chain.from_iterable(map(user_scorers, monitors.values())):
        count = len(scorer.sample_frames(video.num_frames, video.fps))
        frames = torch.rand((1, count, 3, video.height, video.width), generator=rng.generator(0, "trial"))
        try_scorer(scorer, frames.to(trainer.distributed.device) * 2 - 1, prompts[:1], False)


def user_scorers(reward: Reward) -> list[Reward]:
    """Those from users' files, in a mixture or a wrapper too."""
    return [part for part in reward.modules() if isinstance(part, Reward) and part.origin]


def scorer_dtype(base: torch.dtype, mixed_precision: str) -> torch.dtype:
    """The frozen weights' own, except float16, in which small gradients of a pixel round to zero.

    Autocast to bf16 shows that the device has it; any other takes float32.
    """
    if base != torch.float16:
        return base
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32


def adapt_for_training(config: Config, backbone: Backbone) -> None:
    """Attach the trainable adapter, new or read from ``lora_ckpt_path``, and switch checkpointing and compiling on."""
    settings = config.adapter
    path = str(settings.lora_ckpt_path or "")
    adapter = lora.read(path, backbone.original_names) if path else None
    if config.models.grad_checkpoint == "parts":
        recompute_parts(backbone.blocks)
    backbone.denoiser = lora.attach(
        backbone.denoiser,
        backbone.adapter_targets(
            settings.lora_targets or (adapter.targets if adapter else backbone.lora_targets)
        ),
        **(adapter.sizes if adapter else {"rank": settings.lora_rank, "alpha": settings.lora_alpha}),
        dropout=settings.lora_dropout,
        seed=config.run.seed,
    )
    if adapter:
        lora.load(backbone.denoiser, adapter, path)
    if config.models.grad_checkpoint:
        backbone.enable_checkpointing(keep_attention=config.models.grad_checkpoint == "keep_attention")
    if config.models.activation_offloading and backbone.device != backbone.offload_device:
        offload_activations(backbone.denoiser, backbone.offload_device)
    if config.models.compile_blocks:
        backbone.compile_blocks()
