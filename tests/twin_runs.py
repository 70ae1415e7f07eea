"""Runs of the tiny twin through the real entry point."""

from pathlib import Path

import pytest
import twins

from Core.cli import main
from Core.training.trainer import Trainer

SIZE = (16, 32)  # two patches a frame


def start(twin: Path, folder: Path, *flags: str, **overrides) -> int:
    """Exit code of ``CONFIG [flags]`` with the twin's settings and ``overrides``, run in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = twins.config_file(folder.with_suffix(".config.py"), twins.settings(twin, folder, **overrides))
    return main([str(config), *flags])


def built_trainer(twin: Path, folder: Path, **overrides) -> Trainer:
    """The trainer of such a run, with everything built and no step taken."""
    built = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda trainer: built.append(trainer))
        assert start(twin, folder, **overrides) == 0
    return built[0]
