"""Training, from a configuration to a finished run: build everything, continue or begin, fit."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from Core.backbones import Backbone
from Core.build import build_backbone
from Core.config.schema import Config
from Core.data.prompts import Prompt, read_prompts, read_validation_prompts
from Core.evaluation.report import write_report
from Core.modules import lora
from Core.rewards import Reward, build_reward, prompt_errors
from Core.training.metric_logging import Trackers, build_trackers
from Core.training.resume import identity, prepare_folder
from Core.training.trainer import Trainer, global_batch
from Core.training.validation import Validation
from Core.utils.distributed import Runtime
from Core.utils.environment import record_environment
from Core.utils.options import ConfigError

logger = logging.getLogger("vader")


def train(config: Config, runtime: Runtime, folder: Path) -> None:
    """Train an adapter in the run folder ``folder``, from its newest checkpoint if ``resume`` says so."""
    trainer = build_trainer(config, runtime, folder)
    try:
        trainer.fit()
    finally:
        trainer.trackers.close()
    logger.info("the adapter is in %s", folder / "adapter")
    if runtime.is_main:
        report(folder)


def build_trainer(config: Config, runtime: Runtime, folder: Path) -> Trainer:
    """Everything ``train`` needs, where the run in ``folder`` stands."""
    prompts, val_prompts = usable_prompts(config, runtime)
    batch = global_batch(config, runtime.num_processes)
    chosen = prepare_folder(config, folder, prompts, batch) if runtime.is_main else None
    checkpoint = runtime.from_main(chosen)
    backbone, text = build_backbone(config, runtime, [*prompts, *val_prompts])
    reward, monitors = build_scorers(config, runtime, backbone)
    adapt_for_training(config, backbone)
    if runtime.is_main:
        record_environment(folder)
    last_row = checkpoint.step if checkpoint else -1
    trackers = build_trackers(config, folder, last_row) if runtime.is_main else Trackers({})
    validation = Validation(config, runtime, backbone, reward, monitors, val_prompts, text)
    settings = identity(config, prompts, batch)
    trainer = Trainer(
        config, settings, runtime, backbone, reward, prompts, text, validation, folder, trackers
    )
    if checkpoint:
        trainer.resume(checkpoint)
        logger.info("continuing from %s", checkpoint.folder)
    return trainer


def report(folder: Path) -> None:
    """Write the run's page; whatever goes wrong with it costs a message, never the finished run."""
    try:
        logger.info("the report is %s", write_report(folder))
    except Exception as error:
        logger.warning("no report: %s: %s; scripts/report.py writes it", type(error).__name__, error)


def usable_prompts(config: Config, runtime: Runtime) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts of training and of validation.

    Raises:
        ValueError: some cannot be trained on, or not be scored.
    """
    prompts = read_prompts(config)
    val_prompts = read_validation_prompts(config, prompts)
    refuse_references([*prompts, *val_prompts])
    refuse_unscorable([*prompts, *val_prompts], config, runtime)
    return prompts, val_prompts


def refuse_references(prompts: Sequence[Prompt]) -> None:
    """Training generates every frame; a prompt that conditions on a file has no place in it."""
    conditioned = [prompt.text() for prompt in prompts if prompt.reference or prompt.mask_strategy]
    if conditioned:
        raise ValueError(
            f"training prompts cannot have references: {conditioned[0]!r}; remove their JSON suffix"
        )


def refuse_unscorable(prompts: Sequence[Prompt], config: Config, runtime: Runtime) -> None:
    """Report, all at once, the prompts that the trained reward or a monitor cannot score."""
    scorers: list[tuple[str | dict, dict | None]] = [(config.reward_fn, config.reward_arguments)]
    scorers += [(name, config.monitor_args.get(name)) for name in config.monitors]
    texts = [prompt.reward_text for prompt in prompts]
    errors: list[str] = []
    if runtime.is_main:
        for name, arguments in scorers:
            with suppress(FileNotFoundError):  # reported below, with all other weights that are missing
                errors += prompt_errors(name, arguments, texts)
    if errors := runtime.from_main(errors):
        raise ConfigError(list(dict.fromkeys(errors)))


def build_scorers(config: Config, runtime: Runtime, backbone: Backbone) -> tuple[Reward, dict[str, Reward]]:
    """The trained reward and the monitors by name."""
    placed = {"device": runtime.device, "dtype": backbone.dtype}
    reward = build_reward(config.reward_fn, config.reward_arguments, **placed)
    monitors = {name: build_reward(name, config.monitor_args.get(name), **placed) for name in config.monitors}
    return reward, monitors


def adapt_for_training(config: Config, backbone: Backbone) -> None:
    """Attach the trainable adapter, new or read from ``lora_ckpt_path``, and switch checkpointing."""
    backbone.denoiser = lora.attach(
        backbone.denoiser,
        config.lora_targets or backbone.lora_targets,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        seed=config.seed,
    )
    if config.lora_ckpt_path:
        path = str(config.lora_ckpt_path)
        lora.load(backbone.denoiser, lora.read(path), path)
    if config.grad_checkpoint:
        backbone.enable_checkpointing(keep_attention=config.grad_checkpoint == "keep_attention")
    if config.compile_blocks:
        backbone.compile_blocks()
