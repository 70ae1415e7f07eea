"""Where the published weights of the scorers are, and how they get here.

A weight is named by a local file or folder, a hub id ("owner/name") or a pinned https address. Files are
looked for on this machine first; the network is used only for what is missing, and nothing is ever
unpickled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
WEIGHT_SUFFIXES = {".pt", ".pth", ".bin", ".safetensors", ".ckpt"}
TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
PATTERNS = {
    "model": (*TOKENIZER_FILES, "model*.safetensors"),
    "pickled model": (*TOKENIZER_FILES, "pytorch_model*.bin"),
    "tokenizer": TOKENIZER_FILES,
}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One published artefact.

    source: hub id, https address, or local path. kind: `model` (folder in the transformers layout),
    `tokenizer` (the same without weights) or `file` (a single one, `file` in its repository). size:
    approximate download in bytes. sha256: of a pinned file. licence: of the weights.
    """

    source: str
    kind: Literal["model", "tokenizer", "file"] = "model"
    file: str = ""
    size: int = 0
    sha256: str = ""
    licence: str = ""

    def at(self, source: str) -> Weight:
        """The same artefact from another place; what was known of the published one no longer holds there."""
        return self if source == self.source else replace(self, source=source, size=0, sha256="", licence="")

    def named(self, file: str) -> Weight:
        """The same source, another of its files."""
        return replace(self, file=file)

    @property
    def is_local(self) -> bool:
        """Whether `source` names a path, existing or not, rather than a hub id or an address."""
        if self.source.startswith("https://"):
            return False
        path = Path(self.source).expanduser()
        return path.exists() or path.suffix in WEIGHT_SUFFIXES or not HUB_ID.fullmatch(self.source)

    def __str__(self) -> str:
        name = f"{self.source} ({self.file})" if self.file and not self.is_local else self.source
        return f"{name}, about {human_size(self.size)}" if self.size else name


def human_size(size: int) -> str:
    """Bytes in the decimal unit that reads best."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def missing_local(weight: Weight) -> str:
    """One sentence if `weight` names a local path that lacks what is needed there; else ''."""
    if not weight.is_local:
        return ""
    path = Path(weight.source).expanduser()
    wanted = {"model": "a model folder", "tokenizer": "a tokenizer folder", "file": "a weights file"}[
        weight.kind
    ]
    if not path.exists():
        return f"there is no {weight.source!r}; give {wanted} that exists, or a hub id (owner/name)"
    if weight.kind == "file":
        file = path / weight.file if path.is_dir() and weight.file else path
        return "" if file.is_file() else f"{weight.source!r} holds no file {weight.file!r}"
    if not path.is_dir():
        return f"{weight.source!r} is a file; give {wanted} in the transformers layout"
    return (
        ""
        if is_complete(path, weight.kind)
        else f"{weight.source!r} is not {wanted}: {lacking(path, weight.kind)}"
    )


def lacking(folder: Path, kind: str) -> str:
    """What a folder in the transformers layout still lacks, in words."""
    if kind == "tokenizer":
        return "it has no tokenizer.json, vocab.json or tokenizer model"
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    return "it has no model.safetensors (or its shards are incomplete)"


def is_complete(folder: Path, kind: str) -> bool:
    """Whether a folder in the transformers layout has all that `kind` needs."""
    if kind == "tokenizer":
        return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "spiece.model"))
    if not (folder / "config.json").is_file():
        return False
    for index in folder.glob("*.index.json"):
        shards = set(re.findall(r'"([^"]+\.(?:safetensors|bin))"', index.read_text(encoding="utf-8")))
        return all((folder / shard).is_file() for shard in shards)
    return any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))


def locate(weight: Weight) -> Path:
    """Path of the artefact on this machine, downloaded if need be.

    Raises FileNotFoundError (one sentence) if it is neither here nor reachable.
    """
    if problem := missing_local(weight):
        raise FileNotFoundError(problem)
    if weight.is_local:
        path = Path(weight.source).expanduser()
        return path / weight.file if weight.kind == "file" and path.is_dir() else path
    if weight.source.startswith("https://"):
        return _from_address(weight)
    return _hub_file(weight) if weight.kind == "file" else _hub_folder(weight)


def prefetch(weights: Iterable[Weight]) -> None:
    """Bring all `weights` to this machine; FileNotFoundError names every one that cannot be had, at once."""
    missing = []
    for weight in dict.fromkeys(weights):
        try:
            locate(weight)
        except FileNotFoundError as error:
            missing.append(f"{weight} [{error}]")
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} weight(s) are not on this machine and cannot be fetched: {'; '.join(missing)}. "
            "Where the network is open run `python scripts/download_weights.py --reward NAME --to DIR`, "
            "copy DIR here and use the config lines it prints"
        )


def _hub_folder(weight: Weight) -> Path:
    """Snapshot folder of a hub repository; no network call if a complete one is cached."""
    from huggingface_hub import snapshot_download

    try:
        cached = Path(snapshot_download(weight.source, local_files_only=True))
        if is_complete(cached, weight.kind):
            return cached
    except OSError:
        pass  # nothing cached under this id
    kinds = ("model", "pickled model") if weight.kind == "model" else (weight.kind,)
    for kind in kinds:
        folder = Path(_from_hub(snapshot_download, weight.source, allow_patterns=list(PATTERNS[kind])))
        if is_complete(folder, weight.kind):
            return folder
    raise FileNotFoundError(
        f"the hub repository {weight.source} is incomplete: {lacking(folder, weight.kind)}"
    )


def _hub_file(weight: Weight) -> Path:
    """One file of a hub repository; no network call if it is cached."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(weight.source, weight.file)
    return Path(cached if isinstance(cached, str) else _from_hub(hf_hub_download, weight.source, weight.file))


def _from_hub(download, *args, **kwargs) -> str:
    """Call a download function of huggingface_hub; any failure to reach the hub becomes FileNotFoundError."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return download(*args, **kwargs)
    except (OSError, HfHubHTTPError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(reason[:200]) from error


def _from_address(weight: Weight) -> Path:
    """A pinned file from an https address, kept in torch's hub cache."""
    if not weight.sha256:
        raise FileNotFoundError(
            f"{weight.source} is not a pinned address; download the file and give its path"
        )
    target = Path(torch.hub.get_dir()) / "checkpoints" / (weight.file or weight.source.rsplit("/", 1)[-1])
    if target.is_file() and sha256(target) == weight.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(weight.source, str(target), hash_prefix=weight.sha256)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(str(error)) from error
    return target


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
