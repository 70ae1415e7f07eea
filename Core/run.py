"""From a command line to a finished run: parse, build, train or generate."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from Core import lora
from Core.backbones import Backbone
from Core.build import build_backbone
from Core.checkpoint import Checkpoint, Checkpoints
from Core.config import Config, load_config
from Core.options import ConfigError
from Core.prompts import Prompt, read_prompts, read_validation_prompts
from Core.rewards import build_reward
from Core.runtime import Runtime
from Core.sampling import IncompleteError, sample
from Core.tracking import Trackers, build_trackers
from Core.trainer import Trainer

logger = logging.getLogger("vader")
# Keys that may differ between a checkpoint and the run that continues it: none of them changes a step.
FREE_TO_CHANGE = frozenset(
    "max_train_steps num_train_epochs validation_steps checkpointing_steps keep_checkpoints resume val_batch_size "
    "project_dir text_cache logger_type use_wandb wandb_entity verbose debug max_bad_steps is_sample_preview "
    "save_fps frame_interval val_prompt_path num_val_runs lora_scale num_sample save_gif".split()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``CONFIG [flags]``; the exit code is 2 when the user has something to change, 1 when videos are missing."""
    try:
        run(load_config(argv))
    except (ValueError, FileNotFoundError, PermissionError) as error:
        logger.debug("stopped by", exc_info=True)
        for sentence in error.errors if isinstance(error, ConfigError) else [str(error)]:
            print(f"error: {sentence}", file=sys.stderr)
        return 2
    except IncompleteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(config: Config) -> Path:
    """Train or generate; returns the run folder."""
    disable_progress_bar()  # transformers' own, one per network it loads
    runtime = Runtime(config.mixed_precision if config.is_vader_training else "no")
    folder = Path(config.project_dir).expanduser()
    start_log(folder, runtime, config)
    try:
        (train if config.is_vader_training else sample)(config, runtime, folder)
    finally:
        stop_log()
    runtime.close()
    return folder


def train(config: Config, runtime: Runtime, folder: Path) -> None:
    prompts = read_prompts(config)
    val_prompts = read_validation_prompts(config, prompts)
    refuse_references([*prompts, *val_prompts])
    checkpoint = runtime.from_main(prepare_folder(config, folder) if runtime.is_main else None)
    backbone, text = build_backbone(config, runtime, [*prompts, *val_prompts])
    reward_fn, arguments = config.reward_fn, config.reward_arguments
    reward = build_reward(reward_fn, arguments, device=runtime.device, dtype=backbone.dtype)
    adapt_for_training(config, backbone)
    start = checkpoint.step if checkpoint else 0
    trackers = build_trackers(config, folder, start) if runtime.is_main else Trackers({})
    trainer = Trainer(config, runtime, backbone, reward, prompts, val_prompts, text, folder, trackers)
    if checkpoint:
        trainer.resume(checkpoint)
        logger.info("continuing from %s", checkpoint.folder)
    trainer.fit()
    trackers.close()
    logger.info("the adapter is in %s", folder / "adapter")


def refuse_references(prompts: Sequence[Prompt]) -> None:
    """Training generates every frame; a prompt that conditions on a file has no place in it."""
    conditioned = [prompt.text() for prompt in prompts if prompt.reference or prompt.mask_strategy]
    if conditioned:
        raise ValueError(
            f"training prompts cannot have references: {conditioned[0]!r}; remove their JSON suffix"
        )


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
        lora.load(backbone.denoiser, lora.read(config.lora_ckpt_path), config.lora_ckpt_path)
    if config.grad_checkpoint:
        backbone.enable_checkpointing()


def prepare_folder(config: Config, folder: Path) -> Checkpoint | None:
    """Write the resolved config and choose the checkpoint to continue from.

    Raises:
        ValueError: the chosen checkpoint is damaged, or was made with other settings.
    """
    checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
    if config.resume == "never":
        set_aside(folder)
        chosen = None
    elif config.resume == "auto":
        chosen = checkpoints.newest()
    else:
        chosen = Checkpoint(Path(config.resume).expanduser())
        if damage := chosen.damage():
            raise ValueError(f"resume: checkpoint {config.resume!r} cannot be used: {damage}")
    if chosen:
        refuse_contradiction(config, chosen)
    config.save(folder / "config.py")
    return chosen


def set_aside(folder: Path) -> None:
    """Move what an earlier run left in ``folder`` into its ``previous_<n>``, so that nothing is lost."""
    names = ("checkpoints", "samples", "adapter", "metrics.csv", "validation.csv", "config.py")
    left = [folder / name for name in names if (folder / name).exists()]
    if not left:
        return
    number = 1 + sum(1 for _ in folder.glob("previous_*"))
    (folder / f"previous_{number}").mkdir()
    for path in left:
        path.rename(folder / f"previous_{number}" / path.name)


def refuse_contradiction(config: Config, checkpoint: Checkpoint) -> None:
    before = checkpoint.manifest()["config"]
    now = json.loads(json.dumps(config.to_dict()))
    changed = [key for key in now if key not in FREE_TO_CHANGE and before.get(key) != now[key]]
    if changed:
        listed = ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed)
        raise ValueError(
            f"the run in {config.project_dir!r} was made with other settings: {listed}; restore them, choose "
            "another project_dir, or set resume='never'"
        )


class BarHandler(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def start_log(folder: Path, runtime: Runtime, config: Config) -> None:
    """Messages of the main process go to the console and, in full, to ``log.txt``."""
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    console = BarHandler(logging.INFO if config.verbose and runtime.is_main else logging.WARNING)
    logger.addHandler(console)
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)


def stop_log() -> None:
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
