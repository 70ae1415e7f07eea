"""Training state on disk: complete, written atomically, verified when read."""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from Core import lora

logger = logging.getLogger("vader")
MANIFEST = "manifest.json"
STATE = "state.pt"
ADAPTER = "adapter"


@dataclass(frozen=True)
class Checkpoint:
    """A folder ``step_<n>`` with the adapter, the training state and a manifest of hashes."""

    folder: Path

    @property
    def step(self) -> int:
        return int(self.folder.name.removeprefix("step_"))

    @property
    def adapter(self) -> Path:
        return self.folder / ADAPTER

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))

    def damage(self) -> str:
        """What is wrong with the files, in words; empty when all are as they were written."""
        try:
            hashes = self.manifest()["sha256"]
        except (OSError, ValueError, KeyError) as error:
            return f"its {MANIFEST} cannot be read ({type(error).__name__})"
        for name, digest in hashes.items():
            file = self.folder / name
            if not file.is_file():
                return f"{name} is missing"
            if _sha256(file) != digest:
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
        found = [Checkpoint(path) for path in self.folder.glob("step_*") if path.is_dir()]
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
        return None

    def save(self, step: int, model: PeftModel, state: dict[str, Any], settings: dict, score: float | None):
        """Write checkpoint ``step``.

        Args:
            state: what ``torch.load(weights_only=True)`` can read back.
            settings: the resolved configuration.
            score: validation reward at this step, if there was one.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".step_{step:06d}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            lora.save(model, partial / ADAPTER)
            torch.save(state, partial / STATE)
            files = sorted(file for file in partial.rglob("*") if file.is_file())
            hashes = {str(file.relative_to(partial)): _sha256(file) for file in files}
            manifest = {"step": step, "score": score, "config": settings, "sha256": hashes}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for file in (*files, partial / MANIFEST):
                _sync(file)
            target = self.folder / f"step_{step:06d}"
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._prune()

    def _prune(self) -> None:
        checkpoints = self.all()
        scored = [(c.manifest()["score"], c) for c in checkpoints if c.manifest()["score"] is not None]
        kept = {c.step for c in checkpoints[-self.keep :]}
        if scored:
            kept.add(max(scored, key=lambda pair: pair[0])[1].step)
        for checkpoint in checkpoints:
            if checkpoint.step not in kept:
                shutil.rmtree(checkpoint.folder)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
