"""From a command line to a finished run: parse, build, train or generate.

What trains and generates is imported once the configuration is found sound, so that ``--help`` and errors come at once.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from Core.config import Config, ConfigError, load_config
from Core.config.checks import machine_errors
from Core.estimate.memory_savers import needed_beside, unused_savers
from Core.utils.exit_codes import exit_code
from Core.utils.folder_lock import folder_lock
from Core.utils.terminal import ConsoleHandler

if TYPE_CHECKING:
    from Core.utils.distributed import Distributed

logger = logging.getLogger("vader")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``CONFIG [flags]``; returns the exit code."""
    return exit_code(lambda: run(load_config(argv)))


def run(config: Config) -> Path:
    """Train, generate, or only check; returns the run folder."""
    from transformers.utils.logging import disable_progress_bar

    from Core.build import refuse_machine
    from Core.evaluation.gallery import leave_gallery
    from Core.generation.jobs import sample
    from Core.training.setup import train
    from Core.utils.distributed import Distributed

    disable_progress_bar()  # transformers' own, one per network it loads
    training = config.run.is_vader_training
    distributed = Distributed(config.optimizer.mixed_precision if training else "no")
    folder = Path(config.run.project_dir).expanduser()
    if config.run.check_only:
        check(config, distributed, folder)
        return folder
    refuse_machine(config, distributed)
    with sole_owner(folder, distributed) if training else nullcontext():
        start_log(folder, distributed, config.run.verbose)
        try:
            (train if training else sample)(config, distributed, folder)
            if distributed.is_main and not training:
                leave_gallery(folder)
        except torch.OutOfMemoryError as error:
            raise MemoryError(memory_advice(config, str(error))) from error
        except Exception:
            logger.debug("stopped by", exc_info=True)  # in log.txt alone
            raise
        finally:
            stop_log()
        distributed.close()
    return folder


@contextmanager
def sole_owner(folder: Path, distributed: "Distributed") -> Iterator[None]:
    """Within this context no other run trains in ``folder``.

    Raises:
        ConfigError: one does, or the folder cannot be written to; on every process.
    """
    refusal = ""
    with ExitStack() as stack:
        if distributed.is_main:
            try:
                stack.enter_context(folder_lock(folder))
            except BlockingIOError as error:
                refusal = f"{error}; wait until it ends, stop it, or choose another project_dir"
            except OSError as error:
                refusal = f"project_dir {str(folder)!r} cannot be used: {error}"
        if refusal := distributed.broadcast(refusal):
            raise ConfigError([refusal])
        yield


def check(config: Config, distributed: "Distributed", folder: Path) -> None:
    """Find what would stop a run before it loads a network, and bring its weights to this machine.

    Raises:
        ConfigError: unusable prompts, or else with all that is wrong with weights and checkpoint.
    """
    from Core.build import fetch_weights, new_backbone
    from Core.training.setup import refuse_unscorable

    prompts, errors = list(config.prompt_list), process_errors(config)
    if config.run.is_vader_training:
        refuse_unscorable(config, distributed)
        prompts += config.validation_prompt_list
        errors += resume_errors(config, folder)
    try:
        fetch_weights(config, new_backbone(config, distributed.device), distributed, prompts)
    except ConfigError as error:
        errors += error.errors
    if errors:
        raise ConfigError(errors)
    if distributed.device.type == "cuda" and distributed.is_main and config.run.is_vader_training:
        asked = config.run.check_only
        processes = distributed.num_processes if asked is True else int(asked)
        memory = torch.cuda.get_device_properties(distributed.device).total_memory
        say_whether_it_fits(config, memory, processes)


def say_whether_it_fits(config: Config, memory: int, processes: int) -> None:
    """Print the estimate for cards of so many bytes, one a process; where there is none, that is no reason to stop."""
    from Core.estimate.command import fits_sentence

    try:
        print(fits_sentence(config, memory, processes))
    except ValueError as error:
        print(f"no estimate of the memory: {error}")


def process_errors(config: Config) -> list[str]:
    """What is wrong with as many processes as ``check_only`` names, which may run on another machine than the check."""
    if config.run.check_only is True:
        return []
    processes = int(config.run.check_only)
    errors = machine_errors(config, processes)
    if config.run.is_vader_training:
        batch = config.optimizer.global_batch(processes)
        errors += config.objective_class.batch_errors(config.objective, batch)
    return errors


def resume_errors(config: Config, folder: Path) -> list[str]:
    """Why the run would not continue what lies in ``folder``; nothing there is changed."""
    from Core.training.checkpoint import Checkpoints
    from Core.training.resume import choose_checkpoint

    asked = config.run.check_only
    batch = None if asked is True else config.optimizer.global_batch(int(asked))
    checkpoints = Checkpoints(folder / "checkpoints", config.run.keep_checkpoints)
    try:
        choose_checkpoint(config, checkpoints, config.prompt_list, batch)
    except ValueError as error:
        return [str(error)]
    return []


def memory_advice(config: Config, error: str) -> str:
    """One sentence: what did not fit, and the settings that would still save memory."""
    values = config.flat()
    unused = [
        " with ".join(f"{k}={v!r}" for k, v in {key: value, **needed_beside(key, values)}.items())
        for key, value in unused_savers(config)
    ]
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", error)
    failed = f", which tried to allocate {asked[1]} more" if asked else ""
    return (
        f"the device's memory is too small for this run{failed}; set {', '.join([*unused, 'a smaller resolution'])} "
        "or fewer num_frames, one at a time: docs/troubleshooting.md says what each costs, and `vader estimate` with "
        "this config and --gpu NAME finds those that make it fit"
    )


class LogFile(logging.FileHandler):
    """A log file that a full disk costs lines, and the terminal nothing."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Leave the line out."""


def start_log(folder: Path, distributed: "Distributed", verbose: int) -> None:
    """Messages of the main process go to the console and, in full, to ``log.txt``."""
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(ConsoleHandler(logging.INFO if verbose and distributed.is_main else logging.WARNING))
    if distributed.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        file = LogFile(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)


def stop_log() -> None:
    """Leave the logger as ``start_log`` found it, for what else runs in this process."""
    logger.propagate = True
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
