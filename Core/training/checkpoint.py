"""Training state on disk: complete, written atomically, verified when read."""

import io
import json
import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from Core.modules import lora
from Core.utils.distributed import Distributed
from Core.utils.files import hidden, read_object, replacing_folder
from Core.utils.hub import sha256

logger = logging.getLogger("vader")
MANIFEST = "manifest.json"
STATE = "state.pt"
ADAPTER = "adapter"
STEP_FOLDER = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A folder ``step_<n>`` with the adapter, the training state and a manifest of hashes."""

    folder: Path

    @property
    def step(self) -> int:
        match = STEP_FOLDER.fullmatch(self.folder.name)
        return int(match[1]) if match else int(self.manifest()["step"])

    @property
    def adapter(self) -> Path:
        return self.folder / ADAPTER

    def manifest(self) -> dict[str, Any]:
        """What ``Checkpoints.save`` recorded.

        Raises:
            OSError, ValueError: it cannot be read, or is no manifest; the message says what it lacks.
        """
        manifest = read_object(self.folder / MANIFEST)
        forms = {"step": int, "config": dict, "sha256": dict}
        if wrong := [key for key, form in forms.items() if not isinstance(manifest.get(key), form)]:
            raise ValueError(f"it has no {', '.join(wrong)}")
        if unlisted := {STATE, f"{ADAPTER}/{lora.WEIGHTS}"} - manifest["sha256"].keys():
            raise ValueError(f"it has no sha256 of {', '.join(sorted(unlisted))}")
        return manifest

    def score(self) -> float | None:
        """Validation reward when it was made, higher being better; None where there was none to be read."""
        try:
            score = self.manifest().get("score")
        except (OSError, ValueError):
            return None
        return score if isinstance(score, int | float) else None

    def damage(self) -> str:
        """What is wrong with the files, in words; empty when all are as they were written."""
        try:
            hashes = self.manifest()["sha256"]
        except (OSError, ValueError) as error:
            return f"its {MANIFEST} cannot be read ({error})"
        for name, digest in hashes.items():
            file = self.folder / name
            if not file.is_file():
                return f"{name} is missing"
            if sha256(file) != digest:
                return f"{name} is not what was written"
        return ""

    def state(self) -> dict[str, Any]:
        return torch.load(self.folder / STATE, map_location="cpu", weights_only=True)


class Checkpoints:
    """The checkpoints of a run: the newest ``keep``, and the best by validation reward.

    Args:
        folder: created when the first one is saved.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def all(self) -> list[Checkpoint]:
        """Oldest first."""
        found = [Checkpoint(path) for path in self.folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name)]
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def newest(self) -> Checkpoint | None:
        """The newest undamaged one; damaged ones are named in the log."""
        for checkpoint in reversed(self.all()):
            damage = checkpoint.damage()
            if not damage:
                return checkpoint
            logger.warning(
                "checkpoint %s is damaged: %s; the one before it is used", checkpoint.folder, damage
            )
        if self.all():
            logger.warning("no checkpoint in %s can be used; the run begins at step 0", self.folder)
        return None

    def save(self, step: int, model: nn.Module, state: dict[str, Any], settings: dict, score: float | None):
        """Write checkpoint ``step``.

        Args:
            state: what ``torch.load(weights_only=True)`` can read back.
            settings: the resolved configuration.
            score: validation reward at this step, higher being better, if there was one.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        with replacing_folder(self.folder / f"step_{step:06d}") as partial:
            (partial / ADAPTER).mkdir()
            lora.write_into(partial / ADAPTER, model)
            # Through bytes, since torch's own writer reports a full disk as an error of its own kind.
            (partial / STATE).write_bytes(_serialize(state))
            files = sorted(file for file in partial.rglob("*") if file.is_file())
            hashes = {str(file.relative_to(partial)): sha256(file) for file in files}
            manifest = {"step": step, "score": score, "config": settings, "sha256": hashes}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        self.prune()

    def recover(self) -> None:
        """Undo a replacement that a crash interrupted, and clear what else it left half done.

        For a run that begins, before it looks for checkpoints; another that saves here would lose what it writes.
        """
        for replaced in self.folder.glob(".step_*.replaced"):
            target = self.folder / replaced.name.removeprefix(".").removesuffix(".replaced")
            if not target.exists():
                replaced.rename(target)
        for leftover in self.folder.glob(".step_*.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def room_needed(self, size: int, saves: int) -> int:
        """Bytes that ``saves`` more checkpoints of ``size`` bytes take beyond those that lie here."""
        most = self.keep + 2  # with the best, and the one in the making
        return size * min(saves, max(1, most - len(self.all())))

    def prune(self) -> None:
        """Remove all but the newest ``keep`` and the best; a crash may have come before it."""
        checkpoints = self.all()
        scored = [(score, c.step) for c in checkpoints if (score := c.score()) is not None]
        kept = {c.step for c in checkpoints[-self.keep :]}
        if scored:
            kept.add(max(scored)[1])
        for checkpoint in checkpoints:
            if checkpoint.step not in kept:
                # Renamed first: a crash in the middle must not leave half a checkpoint under a whole one's name.
                doomed = hidden(checkpoint.folder, "removed")
                checkpoint.folder.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def set_aside_after(self, step: int, folder: Path) -> list[Checkpoint]:
        """Move checkpoints later than ``step`` into ``folder``: they belong to a course that is not continued."""
        later = [checkpoint for checkpoint in self.all() if checkpoint.step > step]
        if later:
            folder.mkdir(parents=True, exist_ok=True)
        for checkpoint in later:
            checkpoint.folder.rename(folder / checkpoint.folder.name)
        return later


def _serialize(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def refuse_divergence(distributed: Distributed, step: int, tensors: Iterable[Tensor]) -> None:
    """Raise ValueError where the processes hold different adapters."""
    hashes = distributed.gather_objects([lora.digest(tensors)])
    if len(set(hashes)) > 1:
        listed = ", ".join(f"process {rank} {digest[:8]}" for rank, digest in enumerate(hashes))
        raise ValueError(
            f"the adapter differs between processes at step {step} ({listed}); nothing was saved: check that all "
            "machines run the same versions and their memory is sound, then start again to resume from the last "
            "checkpoint"
        )
