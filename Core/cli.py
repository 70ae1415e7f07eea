"""From a command line to a finished run: parse, build, train or generate."""

import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from Core.backbones import BACKBONES
from Core.build import fetch_weights
from Core.config.schema import Config, load_config
from Core.data.prompts import Prompt, read_prompts
from Core.generation.jobs import IncompleteError, sample
from Core.training.checkpoint import Checkpoints
from Core.training.resume import choose_checkpoint
from Core.training.setup import train, usable_prompts
from Core.training.trainer import global_batch
from Core.utils.distributed import Runtime, speaks_for_machine
from Core.utils.options import ConfigError

logger = logging.getLogger("vader")
# Settings of training that need less memory, those first that cost the least quality.
MEMORY_SAVERS = {
    "prefix_cache": 1,
    "grad_checkpoint": True,
    "train_batch_size": 1,
    "val_batch_size": 1,
    "backprop_mode": "last",
    "backprop_steps": 1,
    "decode_frame": -1,
    "dtype": "fp8",
    "use_AdamW8bit": True,
    "guidance_grad": "cond",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``CONFIG [flags]``; returns the exit code."""
    return exit_code(lambda: run(load_config(argv)))


def exit_code(action: Callable[[], object]) -> int:
    """Exit code of ``action``: 2 when the user has something to change, 1 when videos are missing, 3 when the
    memory is too small.

    Each is explained on the standard error stream, one sentence per problem; what is wrong with a configuration
    by one process of a machine.
    """
    try:
        action()
    except ConfigError as error:
        return answer(2, error.errors if speaks_for_machine() else [])
    except (ValueError, FileNotFoundError, PermissionError) as error:
        logger.debug("stopped by", exc_info=True)
        return answer(2, [str(error)])
    except IncompleteError as error:
        return answer(1, [str(error)])
    except (MemoryError, torch.OutOfMemoryError) as error:
        return answer(3, [str(error)])
    return 0


def answer(code: int, sentences: Sequence[str]) -> int:
    for sentence in sentences:
        print(f"error: {sentence}", file=sys.stderr)
    return code


def run(config: Config) -> Path:
    """Train, generate, or only check; returns the run folder."""
    disable_progress_bar()  # transformers' own, one per network it loads
    runtime = Runtime(config.mixed_precision if config.is_vader_training else "no")
    folder = Path(config.project_dir).expanduser()
    if config.check_only:
        check(config, runtime, folder)
        return folder
    start_log(folder, runtime, config)
    try:
        (train if config.is_vader_training else sample)(config, runtime, folder)
    except torch.OutOfMemoryError as error:
        raise MemoryError(memory_advice(config, str(error))) from error
    finally:
        stop_log()
    runtime.close()
    return folder


def check(config: Config, runtime: Runtime, folder: Path) -> None:
    """Find what would stop a run before it loads a network, and bring its weights to this machine.

    Raises:
        ValueError: unusable prompts, or else with all that is wrong with weights and checkpoint.
    """
    if config.is_vader_training:
        training, validation = usable_prompts(config, runtime)
        prompts = [*training, *validation]
        errors = resume_errors(config, folder, training)
    else:
        prompts, errors = read_prompts(config), []
    try:
        fetch_weights(
            config, BACKBONES[config.backbone].from_config(config, runtime.device), runtime, prompts
        )
    except ConfigError as error:
        errors += error.errors
    if errors:
        raise ConfigError(errors)


def resume_errors(config: Config, folder: Path, prompts: Sequence[Prompt]) -> list[str]:
    """Why the run would not continue what lies in ``folder``; nothing there is changed."""
    processes = None if config.check_only is True else int(config.check_only)
    batch = global_batch(config, processes) if processes else None
    try:
        choose_checkpoint(
            config, Checkpoints(folder / "checkpoints", config.keep_checkpoints), prompts, batch
        )
    except ValueError as error:
        return [str(error)]
    return []


def memory_advice(config: Config, error: str) -> str:
    """One sentence: what did not fit, and the settings that would still save memory."""
    savers = MEMORY_SAVERS if config.is_vader_training else {"val_batch_size": 1, "dtype": "fp8"}
    same = {"decode_frame"} if isinstance(config.decode_frame, int) else set()  # any one frame costs the same
    if config.compile_blocks or config.base_quant != "none":
        same.add("dtype")  # would be refused beside them
    unused = [f"{k}={v!r}" for k, v in savers.items() if k not in same and getattr(config, k) != v]
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", error)
    failed = f", which tried to allocate {asked[1]} more" if asked else ""
    return (
        f"the device's memory is too small for this run{failed}; set {', '.join([*unused, 'a smaller resolution'])} "
        "or fewer num_frames, one at a time: docs/troubleshooting.md says what each costs"
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
    """Leave the logger as ``start_log`` found it, for what else runs in this process."""
    logger.propagate = True
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
