"""Where numbers and videos go: always CSV files, and wandb or tensorboard behind the same calls.

A tracker that fails costs a warning, never the run.
"""

import csv
import errno
import io
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger("vader")
INIT_TIMEOUT = 30  # seconds after which wandb counts as out of reach


class Tracker(Protocol):
    """One destination; ``scalars`` are named ``group/name``."""

    def log(self, scalars: Mapping[str, float], step: int) -> None: ...

    def log_videos(self, paths: Sequence[Path], captions: Sequence[str], step: int) -> None: ...

    def close(self) -> None: ...


class CsvTable:
    """A CSV file with one row per step, flushed row by row; a row with a new column rewrites the file.

    A row that a full disk refuses is kept and written with the next one.

    Args:
        resume_step: rows after it belong to steps that will be done again, and are dropped.
    """

    def __init__(self, path: Path, resume_step: int = -1):
        self.path = path
        self.columns: list[str] = []
        self.waiting: list[Mapping[str, Any]] = []
        if path.is_file():
            rows = [row for row in _complete_rows(path) if int(row["step"]) <= resume_step]
            self.columns = list(rows[0]) if rows else []
            self._rewrite(rows)

    def append(self, row: Mapping[str, Any]) -> None:
        self.waiting.append(row)
        try:
            self._write_waiting()
        except OSError as error:
            logger.warning("%s: %s; its rows are kept until they can be written", self.path, error)
            return
        self.waiting.clear()

    def _write_waiting(self) -> None:
        new = [
            name for name in dict.fromkeys(n for row in self.waiting for n in row) if name not in self.columns
        ]
        if new:
            before = _complete_rows(self.path) if self.columns else []
            self.columns = [*self.columns, *new]
            self._rewrite([*before, *self.waiting])
            return
        # One write for all, so that a killed run leaves whole lines; what a full disk cut short is taken back.
        size, lines = self.path.stat().st_size, self._lines(self.waiting)
        try:
            with open(self.path, "ab", buffering=0) as file:
                if file.write(lines) < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.truncate(self.path, size)
            raise

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        header = dict(zip(self.columns, self.columns, strict=True))
        partial.write_bytes(self._lines([header, *rows]) if self.columns else b"")
        os.replace(partial, self.path)

    def _lines(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()


def read_table(path: Path) -> list[dict[str, float]]:
    """Rows of a table of numbers; an empty cell is NaN."""
    return [{key: float(value or "nan") for key, value in row.items()} for row in _complete_rows(path)]


def _complete_rows(path: Path) -> list[dict[str, str]]:
    """Rows as text, without a last line that a crash cut short."""
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    # Without its newline a last line may lack digits.
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(whole)) if None not in row.values() and None not in row]


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
        """Every row is on disk already."""


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
    """tensorboard; videos become animated GIFs, which its image tab plays."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resume_step: int = -1):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
        self.writer.add_text("config", "\n".join(f"    {key} = {value!r}" for key, value in config.items()))

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_videos(self, paths: Sequence[Path], captions: Sequence[str], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for number, path in enumerate(paths):
            image = Summary.Image(encoded_image_string=animated_gif(path))
            summary = Summary(value=[Summary.Value(tag=f"validation/video_{number}", image=image)])
            self.writer._get_file_writer().add_summary(summary, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def animated_gif(path: Path) -> bytes:
    """A video or picture file as a GIF that loops."""
    import av
    from PIL import Image

    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            rate = float(container.streams.video[0].average_rate or 1)
            frames = [frame.to_image() for frame in container.decode(video=0)]
    else:
        rate, frames = 1.0, [Image.open(path)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / rate), loop=0)
    return out.getvalue()


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


def build_trackers(config, folder: Path, resume_step: int = -1) -> Trackers:
    """Trackers that the configuration asks for; ``debug`` keeps to the CSV files."""
    choices: dict[str, Callable[[], Tracker]] = {"csv": lambda: CsvTracker(folder, resume_step)}
    settings = config.to_dict()
    if config.logger_type == "tensorboard" and not config.debug:
        choices["tensorboard"] = lambda: TensorboardTracker(folder, settings, resume_step)
    if config.logger_type == "wandb" and config.use_wandb and not config.debug:
        choices["wandb"] = lambda: WandbTracker(folder, settings, config.wandb_entity)
    return Trackers(choices)
