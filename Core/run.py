"""From a command line to a finished run: parse, build, train or generate."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from Core.config import Config, load_config
from Core.options import ConfigError
from Core.runtime import Runtime
from Core.sampling import IncompleteError, sample
from Core.training import train

logger = logging.getLogger("vader")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``CONFIG [flags]``; returns the exit code."""
    return exit_code(lambda: run(load_config(argv)))


def exit_code(action: Callable[[], object]) -> int:
    """Exit code of ``action``: 2 when the user has something to change, 1 when videos are missing.

    Either is explained on the standard error stream, one sentence per problem.
    """
    try:
        action()
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
