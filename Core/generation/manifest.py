"""Which videos a run makes, and which are there already by the ``prompts.jsonl`` of their folder."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from Core.backbones import Prompt
from Core.utils import rng
from Core.utils.files import path_fault, write_whole
from Core.utils.words import counted

logger = logging.getLogger("vader")
MANIFEST = "prompts.jsonl"
PARTIAL = ".partial_"  # prefix of files that are not complete


@dataclass(frozen=True)
class Sample:
    """One video to make. Its noise depends on ``seed`` and the prompt's text alone."""

    prompt: Prompt
    index: int
    copy: int
    seed: int

    @property
    def name(self) -> str:
        """File name without suffix: number of the prompt, number of the copy, and the prompt's first words."""
        words = "".join(c if c.isalnum() else " " for c in self.prompt.reward_text).split()
        return f"{self.index:04d}_{self.copy}_{'_'.join(words)[:40]}"

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this sample from others in a manifest."""
        return {"name": self.name, **self.prompt.identity, "seed": self.seed}

    def generator(self, purpose: str, clip: int) -> torch.Generator:
        return rng.generator(self.seed, purpose, self.prompt.text, clip)


def plan_samples(prompts: Sequence[Prompt], copies: int, seed: int, first_index: int = 0) -> list[Sample]:
    """``copies`` videos of each prompt, with seeds from ``seed`` upwards."""
    return [
        Sample(prompt, first_index + number, copy, seed + copy)
        for number, prompt in enumerate(prompts)
        for copy in range(copies)
    ]


def clear_partial(folder: Path) -> None:
    """Remove what a killed run left half written."""
    for leftover in folder.glob(f".*{PARTIAL.lstrip('.')}*"):
        leftover.unlink()


def unfinished(
    samples: Sequence[Sample], folder: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[Sample]:
    """Samples that are not in ``folder`` yet, made with the same ``settings``.

    Args:
        defaults: what a key stood at in videos that were recorded without it.
    """
    wanted, defaults = json.loads(json.dumps([dict(settings), dict(defaults)]))
    recorded = {entry["name"]: {**defaults, **entry} for entry in read_manifest(folder)}
    todo, replaced = [], 0
    for sample in samples:
        entry = recorded.get(sample.name)
        if entry is None:
            todo.append(sample)
        elif not (sample.identity | wanted).items() <= entry.items():
            todo.append(sample)
            replaced += 1
    if replaced:
        logger.warning(
            "%s in %s made with other settings will be replaced; choose another project_dir to keep what is there",
            counted(replaced, "video"), folder,
        )  # fmt: skip
    return todo


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """Entries of ``prompts.jsonl`` whose files are there, the newest of each name, by name."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return []
    lines = manifest.read_text(encoding="utf-8", errors="replace").splitlines()
    newest = {entry["name"]: entry for entry in map(_parse_line, lines) if entry}
    return [newest[name] for name in sorted(newest) if (folder / newest[name]["file"]).is_file()]


def _parse_line(line: str) -> dict[str, Any]:
    """An entry, or nothing where the line is cut short or damaged, or names no file of its folder."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    named = isinstance(entry, dict) and isinstance(entry.get("name"), str)
    return entry if named and path_fault(str(entry.get("file", ""))) == "" else {}


def tidy_manifest(folder: Path) -> None:
    """Rewrite ``prompts.jsonl`` in the order of names, without entries whose files are gone."""
    lines = [json.dumps(entry) + "\n" for entry in read_manifest(folder)]
    write_whole(folder / MANIFEST, "".join(lines))


def append_line(path: Path, line: str) -> None:
    """Append a line in one system call, so that processes do not mix theirs and a crash leaves whole lines."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(handle, f"{line}\n".encode())
    finally:
        os.close(handle)
