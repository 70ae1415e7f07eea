"""Where numbers and videos go: always CSV files, and wandb or tensorboard behind the same calls.

A tracker that fails costs a warning, never the run.
"""

import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from Core.config import Config
from Core.data.video import animated_gif
from Core.utils.tables import CsvTable

logger = logging.getLogger("vader")
INIT_TIMEOUT = 30  # seconds after which wandb counts as out of reach


@dataclass(frozen=True)
class StepMetrics:
    """One training step, averaged over its global batch and its optimiser steps.

    Attributes:
        skipped: the step, or one of its optimiser steps, was not applied.
        scaler_calibrating: because fp16's scaler was still looking for its scale, which is no fault.
        stopping: some process was asked to stop.
        timings: seconds of this process by part of the step.
    """

    reward: float
    loss: float
    grad_norm: float
    parts: dict[str, float]
    skipped: bool
    scaler_calibrating: bool
    stopping: bool
    timings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def mean(cls, updates: Sequence["StepMetrics"], timings: dict[str, float]) -> "StepMetrics":
        """Of a training step from its optimiser steps."""
        count = len(updates)
        return cls(
            reward=sum(update.reward for update in updates) / count,
            loss=sum(update.loss for update in updates) / count,
            grad_norm=sum(update.grad_norm for update in updates) / count,
            parts={name: sum(u.parts[name] for u in updates) / count for name in updates[0].parts},
            skipped=any(update.skipped for update in updates),
            scaler_calibrating=any(update.scaler_calibrating for update in updates),
            stopping=any(update.stopping for update in updates),
            timings=timings,
        )

    @property
    def seconds(self) -> float:
        return sum(self.timings.values())

    def scalars(self, lr: float) -> dict[str, float]:
        named = {"reward": self.reward, "loss": self.loss, "grad_norm": self.grad_norm, "lr": lr}
        named |= {"skipped": float(self.skipped), **self.parts, "seconds": self.seconds}
        named["all_reduce_share"] = self.timings["all_reduce"] / self.seconds
        named |= {f"seconds_{part}": seconds for part, seconds in self.timings.items()}
        return {f"train/{name}": value for name, value in named.items()}


class Tracker(Protocol):
    """One destination; ``scalars`` are named ``group/name``."""

    def log(self, scalars: Mapping[str, float], step: int) -> None: ...

    def log_videos(self, paths: Sequence[Path], captions: Sequence[str], step: int) -> None: ...

    def close(self) -> None: ...


class CsvTracker:
    """``metrics.csv`` for the training steps, ``validation.csv`` for validations."""

    def __init__(self, folder: Path, resume_step: int = -1):
        self.tables = {
            "train": CsvTable(folder / "metrics.csv", resume_step),
            "validation": CsvTable(folder / "validation.csv", resume_step),
        }

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        groups: dict[str, dict[str, float]] = {}
        for name, value in scalars.items():
            group, _, key = name.partition("/")
            groups.setdefault(group, {"step": step})[key] = value
        for group, row in groups.items():
            self.tables[group].append(row)

    def log_videos(self, paths: Sequence[Path], captions: Sequence[str], step: int) -> None:
        """Videos lie in the run folder already."""

    def close(self) -> None:
        """Every row is on disk already, unless the disk was full or the file deleted since."""
        for table in self.tables.values():
            if table.columns:
                table.save()


class WandbTracker:
    """Weights & Biases; offline when nobody is logged in, so that it never waits for an answer.

    A run that continues keeps its id, and with it its curves.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], entity: str | None):
        import wandb

        mode: Any = os.environ.get("WANDB_MODE")
        if not mode and not wandb.api.api_key:
            logger.warning(
                "wandb: no login, so this run is logged offline; log in with `wandb login`, or upload it later "
                "with `wandb sync`"
            )
            mode = "offline"
        self.wandb = wandb
        self.run = wandb.init(
            project="vader",
            entity=entity,
            dir=str(folder),
            config=dict(config),
            name=folder.name,
            id=_run_id(folder),
            resume=None if mode == "offline" else "allow",
            mode=mode,
            settings=wandb.Settings(init_timeout=INIT_TIMEOUT),
        )

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self.run.log(dict(scalars), step=step)

    def log_videos(self, paths: Sequence[Path], captions: Sequence[str], step: int) -> None:
        media = [_wandb_media(self.wandb, path, text) for path, text in zip(paths, captions, strict=True)]
        self.run.log({"validation/videos": media}, step=step)

    def close(self) -> None:
        self.run.finish()


def _run_id(folder: Path) -> str:
    """An id of this run folder, drawn once and kept in it."""
    file = folder / "wandb_id.txt"
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return file.read_text(encoding="utf-8")


def _wandb_media(wandb, path: Path, caption: str):
    kind = wandb.Video if path.suffix == ".mp4" else wandb.Image
    return kind(str(path), caption=caption)


class TensorboardTracker:
    """tensorboard; videos become animated GIFs under their prompts, which its image tab plays."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resume_step: int = -1):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
        self.writer.add_text("config", "\n".join(f"    {key} = {value!r}" for key, value in config.items()))

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_videos(self, paths: Sequence[Path], captions: Sequence[str], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

        for number, (path, caption) in enumerate(zip(paths, captions, strict=True)):
            image = Summary.Image(encoded_image_string=animated_gif(path))
            named = SummaryMetadata(display_name=f"{number}: {caption}", summary_description=caption)
            value = Summary.Value(tag=f"validation/video_{number}", metadata=named, image=image)
            self.writer._get_file_writer().add_summary(Summary(value=[value]), step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Trackers:
    """All trackers of a run; a tracker that raises is named once and dropped."""

    def __init__(self, trackers: Mapping[str, Callable[[], Tracker]]):
        self.active: dict[str, Tracker] = {}
        for name, build in trackers.items():
            self._guard(name, partial(self._start, name, build))

    def _start(self, name: str, build: Callable[[], Tracker]) -> None:
        self.active[name] = build()

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker's network, key or disk raises, training goes on
            logger.warning(
                "tracker %s failed (%s: %s); the run goes on without it", name, type(error).__name__, error
            )
            self.active.pop(name, None)

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.active.items()):
            self._guard(name, partial(action, tracker))

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(scalars, step))

    def log_videos(self, paths: Sequence[Path], captions: Sequence[str], step: int) -> None:
        self._each(lambda tracker: tracker.log_videos(paths, captions, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())


def build_trackers(config: Config, folder: Path, resume_step: int = -1) -> Trackers:
    """Trackers that the configuration asks for; ``debug`` keeps to the CSV files."""
    choices: dict[str, Callable[[], Tracker]] = {"csv": lambda: CsvTracker(folder, resume_step)}
    settings, tracking = config.flat(), config.tracking
    if tracking.logger_type == "tensorboard" and not config.run.debug:
        choices["tensorboard"] = lambda: TensorboardTracker(folder, settings, resume_step)
    if tracking.logger_type == "wandb" and tracking.use_wandb and not config.run.debug:
        choices["wandb"] = lambda: WandbTracker(folder, settings, tracking.wandb_entity)
    return Trackers(choices)
