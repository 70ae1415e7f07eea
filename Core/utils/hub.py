"""Where published weights are, and how they get here.

A weight is named by a local file or folder, a hub id ("owner/name") or a pinned https address. Files are
looked for on this machine first; the network is used only for what is missing.
"""

import hashlib
import logging
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from Core.utils.damage import read_settings
from Core.utils.files import path_fault

logger = logging.getLogger("vader")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")  # owner/name, or owner/name@revision
COMMIT = re.compile(r"[0-9a-f]{40}")
FILE_SUFFIXES = {".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".txt", ".py", ".whl"}  # not of hub ids
TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
MODEL_FILES = (*TOKENIZER_FILES, "model*.safetensors")
PICKLED_MODEL_FILES = (*TOKENIZER_FILES, "pytorch_model*.bin")
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
REASON_LIMIT = 300  # characters of what the hub's client says
KINDS = {
    "model": "a model folder",
    "tokenizer": "a tokenizer folder",
    "checkpoint": "a folder of checkpoints",
    "pipeline": "a pipeline in the layout of diffusers",
    "file": "a file",
}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One published artefact.

    source: hub id (``owner/name``, or pinned ``owner/name@revision``), https address, or local path. kind: ``model``
    (folder in the transformers layout), ``tokenizer`` (the same without weights), ``checkpoint`` (folder of another
    layout, see ``layouts``) or ``file`` (a single one, ``file`` in its repository). parts: what a model folder must
    hold beside the network. layouts: what a checkpoint folder may hold, alternatives in order, each a set of patterns.
    size: approximate download in bytes. sha256: of a pinned file. licence: of the weights. named_by: the key or the
    argument that names it, for messages.
    """

    source: str
    kind: Literal["model", "tokenizer", "checkpoint", "pipeline", "file"] = "model"
    parts: tuple[Literal["tokenizer", "processor"], ...] = ()
    layouts: tuple[tuple[str, ...], ...] = ()
    file: str = ""
    size: int = 0
    sha256: str = ""
    licence: str = ""
    named_by: str = field(default="", compare=False)

    def at(self, source: str) -> "Weight":
        """The same artefact from another place; what was known of the published one no longer holds there."""
        return self if source == self.source else replace(self, source=source, size=0, sha256="", licence="")

    def named(self, file: str) -> "Weight":
        """The same source, another of its files."""
        return replace(self, file=file)

    @property
    def is_local(self) -> bool:
        """Whether ``source`` names a path, existing or not, rather than a hub id or an address."""
        if self.source.startswith("https://"):
            return False
        if path_fault(self.source):
            return True
        path = Path(self.source).expanduser()
        return path.exists() or path.suffix in FILE_SUFFIXES or not HUB_ID.fullmatch(self.source)

    @property
    def name(self) -> str:
        """Name of the file or folder it is downloaded to; that of a repository names its owner too."""
        return self.file if self.source.startswith("https://") else self.source.replace("/", "--")

    @property
    def patterns(self) -> tuple[tuple[str, ...], ...]:
        """Files to fetch from a repository, alternatives in order: pickled ones only if there are no others."""
        if self.kind == "file":
            return ((self.file,),)
        if self.kind == "checkpoint":
            return self.layouts
        return (TOKENIZER_FILES,) if self.kind == "tokenizer" else (MODEL_FILES, PICKLED_MODEL_FILES)

    def lacks(self, folder: Path) -> str:
        """What ``folder`` still lacks to hold the artefact, in words; '' if it is complete."""
        if self.kind == "file":
            return "" if (folder / self.file).is_file() else f"it has no file {self.file!r}"
        if self.kind == "tokenizer":
            return _lacks_tokenizer(folder)
        if self.kind == "checkpoint":
            lacking = [[p for p in patterns if not any(folder.glob(p))] for patterns in self.layouts]
            return (
                "" if [] in lacking else f"it has no {' or '.join(' with '.join(names) for names in lacking)}"
            )
        if not (folder / "config.json").is_file():
            return "it has no config.json"
        whole = any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))
        if not whole and not any(_has_shards(folder, index) for index in folder.glob("*.index.json")):
            return "it has no model.safetensors and no complete set of shards"
        if "tokenizer" in self.parts and (lack := _lacks_tokenizer(folder)):
            return lack
        if "processor" in self.parts and not any((folder / name).is_file() for name in PROCESSOR_FILES):
            return f"it has no {' or '.join(PROCESSOR_FILES)}"
        return ""

    def __str__(self) -> str:
        of_repository = self.file and not self.is_local and not self.source.startswith("https://")
        name = f"{self.source} ({self.file})" if of_repository else self.source
        size = f", about {human_size(self.size)}" if self.size else ""
        return name + size + (f", named by {self.named_by}" if self.named_by else "")


def human_size(size: int) -> str:
    """Bytes in the decimal unit that reads best."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def _lacks_tokenizer(folder: Path) -> str:
    """What a folder lacks to hold a tokenizer, in words; '' if it is complete."""
    sets = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))
    if any(all((folder / name).is_file() for name in names) for names in sets):
        return ""
    return f"it has no {' or '.join(' with '.join(names) for names in sets)}"


def _has_shards(folder: Path, index: Path) -> bool:
    """Whether every shard an index file names is there."""
    named = read_settings(index).get("weight_map")
    return isinstance(named, dict) and all((folder / str(shard)).is_file() for shard in named.values())


def missing_local(weight: Weight) -> str:
    """One sentence if ``weight`` names a local path that lacks what is needed there; else ''."""
    if not weight.is_local:
        return ""
    if fault := path_fault(weight.source):
        return f"{weight.source[:80]!r}: {fault}"
    path, wanted = Path(weight.source).expanduser(), KINDS[weight.kind]
    if not path.exists():
        return f"there is no {weight.source!r}; give {wanted} that exists, or a hub id (owner/name)"
    if path.is_file():
        return "" if weight.kind == "file" else f"{weight.source!r} is a file; give {wanted}"
    try:
        lack = weight.lacks(path)
    except ValueError as error:  # an index that is damaged
        lack = str(error)
    return f"{weight.source!r} is not {wanted}: {lack}" if lack else ""


def locate(weight: Weight, into: Path | None = None) -> Path:
    """Path of the artefact on this machine, downloaded if need be.

    Args:
        into: folder to download to, one subfolder per repository; by default the caches of the hub and of torch.

    Raises:
        FileNotFoundError: it is neither here nor reachable.
    """
    if problem := missing_local(weight):
        raise FileNotFoundError(problem)
    return prefetch([weight], into)[weight]


def _find(weight: Weight, into: Path | None) -> Path:
    """``locate``, whose errors give no more than the reason."""
    if problem := missing_local(weight):
        raise FileNotFoundError(problem)
    if weight.source.startswith("https://"):
        return _from_address(weight, into)
    folder = Path(weight.source).expanduser() if weight.is_local else _from_hub(weight, into)
    return folder / weight.file if weight.kind == "file" and folder.is_dir() else folder


def prefetch(weights: Iterable[Weight], into: Path | None = None) -> dict[Weight, Path]:
    """Bring all ``weights`` to this machine, as ``locate`` does each.

    Raises:
        FileNotFoundError: some cannot be had; the message names all of them.
    """
    paths: dict[Weight, Path] = {}
    missing: dict[Weight, FileNotFoundError] = {}
    for weight in dict.fromkeys(weights):
        try:
            paths[weight] = _find(weight, into)
        except FileNotFoundError as error:
            missing[weight] = error
    if missing:
        raise FileNotFoundError(_missing_words(missing))
    return paths


class UnreachableError(FileNotFoundError):
    """Another machine may fetch it."""


def _missing_words(missing: Mapping[Weight, FileNotFoundError]) -> str:
    """One sentence: what is missing, why, and what to do about it."""
    names, reasons = "; ".join(map(str, missing)), "; ".join(dict.fromkeys(map(str, missing.values())))
    count = "one of the weights is" if len(missing) == 1 else f"{len(missing)} of the weights are"
    sentence = f"{count} not on this machine and cannot be fetched: {names} ({reasons})"
    if not any(isinstance(error, UnreachableError) for error in missing.values()):
        return sentence
    return (
        f"{sentence}. Where the network is open run `vader download --to DIR` with --reward NAME or --model NAME, copy "
        "DIR here and use the config lines it prints"
    )


def present(weight: Weight) -> Path | None:
    """Path of the artefact if it lies on this machine, complete or not; the network is not used."""
    if weight.source.startswith("https://"):
        return None
    if weight.is_local:
        path = Path(weight.source).expanduser()
        return path if path.exists() else None
    return _cached_snapshot(weight.source)


def _from_hub(weight: Weight, into: Path | None) -> Path:
    """Folder with the files of a hub repository that ``weight`` needs; no network call if they are here."""
    present = into / weight.name if into else _cached_snapshot(weight.source)
    if present and not weight.lacks(present):
        return present
    _announce(weight)
    for patterns in weight.patterns:
        folder = _download_snapshot(weight.source, patterns, into and into / weight.name)
        if not weight.lacks(folder):
            return folder
    raise FileNotFoundError(f"{weight.source} on the hub is not {KINDS[weight.kind]}: {weight.lacks(folder)}")


def _repository(source: str) -> tuple[str, dict[str, Any]]:
    """A hub id without its revision, and that as an argument of the hub's client."""
    name, _, revision = source.partition("@")
    return name, {"revision": revision} if revision else {}


def commit_of(weight: Weight) -> str | None:
    """The commit that a hub id stands for in this machine's cache; None for anything else."""
    if weight.is_local or weight.source.startswith("https://"):
        return None
    found = _cached_snapshot(weight.source)
    return found.name if found and COMMIT.fullmatch(found.name) else None


def _cached_snapshot(source: str) -> Path | None:
    """Folder of a repository in the hub's cache, complete or not."""
    from huggingface_hub import snapshot_download

    name, pinned = _repository(source)
    try:
        return Path(snapshot_download(name, **pinned, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no name the hub takes
        return None


def _download_snapshot(source: str, patterns: tuple[str, ...], folder: Path | None) -> Path:
    """Download the files of a repository that match; any failure becomes FileNotFoundError."""
    from huggingface_hub import snapshot_download

    name, pinned = _repository(source)
    try:
        return Path(snapshot_download(name, **pinned, allow_patterns=list(patterns), local_dir=folder))
    except Exception as error:  # the client's own, those of httpx under two names, those of its storage
        raise _refusal(error, name) from error


def _refusal(error: Exception, name: str) -> FileNotFoundError:
    """Why the hub did not give the repository ``name``, and what to do where that depends on the reason."""
    from huggingface_hub import errors

    chain = [error, error.__cause__]
    if any(isinstance(link, errors.OfflineModeIsEnabled) for link in chain):
        return UnreachableError("HF_HUB_OFFLINE is set; unset it to download")
    if isinstance(error, errors.GatedRepoError):
        return FileNotFoundError(
            f"its owner asks for consent: give it on https://huggingface.co/{name}, then run `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"the hub has no repository {name!r} that this account may read; check the id, or run `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{name!r} has no such revision; check what follows the @")
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        return UnreachableError(f"the hub cannot be reached: {_reason(error.__cause__)}")
    return UnreachableError(_reason(error))


def _reason(error: BaseException) -> str:
    """The first line of what an error says, whole words of it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[0], REASON_LIMIT, placeholder=" …")


def _from_address(weight: Weight, into: Path | None) -> Path:
    """A pinned file from an https address, checked against its hash; a copy in the current folder will do."""
    import torch  # here, since it takes seconds, and lists of weights do without

    if not weight.sha256:
        raise FileNotFoundError(
            f"{weight.source} is not a pinned address; download the file"
            f"{weight.licence and f' (licence {weight.licence})'} and give its path"
        )
    target = (into or Path(torch.hub.get_dir()) / "checkpoints") / weight.name
    for copy in (target, *([] if into else [Path(weight.name)])):
        if copy.is_file() and sha256(copy) == weight.sha256:
            return copy
    target.parent.mkdir(parents=True, exist_ok=True)
    _announce(weight)
    try:
        torch.hub.download_url_to_file(weight.source, str(target), hash_prefix=weight.sha256)
    except (OSError, RuntimeError) as error:
        raise UnreachableError(_reason(error)) from error
    return target


def _announce(weight: Weight) -> None:
    """Say what is fetched, and under which licence it is."""
    logger.info("fetching %s%s", weight, weight.licence and f", licence {weight.licence}")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
