"""Inference: the videos of every prompt, for the base model or for adapters side by side."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from Core.backbones import Backbone
from Core.build import build_backbone
from Core.config.schema import BASE
from Core.data.prompts import Prompt, read_prompts
from Core.generation.generate import (
    Sample,
    clear_partial,
    plan_samples,
    tidy_manifest,
    unfinished,
    write_videos,
)
from Core.modules import lora
from Core.utils.distributed import Runtime
from Core.utils.environment import record_environment

logger = logging.getLogger("vader")
# Folders that say nothing of which adapter it is.
GENERIC_FOLDERS = ("adapter", "checkpoints", "adapter_model")
# What a video depends on besides prompt, seed and adapter.
SETTINGS = tuple(
    "resolution aspect_ratio image_size num_frames fps frame_interval save_fps multi_resolution aes flow "
    "camera_motion model vae text_encoder scheduler dtype loop condition_frame_length condition_frame_edit "
    "align save_gif".split()
)


class IncompleteError(RuntimeError):
    """Some videos could not be made; those that could are there."""


@dataclass(frozen=True)
class Variant:
    """The base model (``adapter`` None), or an adapter on it; its videos are filed under ``name``."""

    name: str
    path: str | None = None
    adapter: lora.Adapter | None = None

    def settings(self, config) -> dict[str, Any]:
        """What is recorded with each of its videos, enough to make the video again."""
        of_adapter = {"adapter": self.path, "adapter_sha256": None, "lora_scale": None}
        if self.adapter:
            of_adapter |= {"adapter_sha256": fingerprint(self.adapter), "lora_scale": config.lora_scale}
        return of_adapter | {key: getattr(config, key) for key in SETTINGS}


def fingerprint(adapter: lora.Adapter) -> str:
    """Digest of an adapter's weights and scaling: the same path may hold another adapter tomorrow."""
    digest = hashlib.sha256(f"{adapter.rank} {adapter.alpha}".encode())
    for key in sorted(adapter.state):
        digest.update(key.encode())
        digest.update(adapter.state[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def adapter_names(paths: Sequence[str]) -> list[str]:
    """A short, distinct folder name for each adapter path, from the folders it lies in."""
    parts = [_telling_parts(path) for path in paths]
    for depth in range(1, 1 + max(map(len, parts), default=0)):
        names = ["-".join(part[-depth:]) for part in parts]
        if len({*names, BASE}) == len(names) + 1:
            return names
    return [f"{number}-{part[-1]}" for number, part in enumerate(parts, 1)]


def _telling_parts(path: str) -> list[str]:
    absolute = Path(path).expanduser().absolute()
    parts = [absolute.stem if absolute.suffix in (".pt", ".safetensors") else absolute.name]
    parts = [*absolute.parts[1:-1], *parts]
    return [part for part in parts if part not in GENERIC_FOLDERS] or ["adapter"]


def read_variants(paths: Sequence[str | None]) -> list[Variant]:
    """Variants of adapter paths, read; ``base`` or None is the base model.

    Raises:
        FileNotFoundError, ValueError: nothing there, no adapter, or the same one twice.
    """
    doubled = [path for path in paths if paths.count(path) > 1]
    if doubled:
        raise ValueError(f"lora_ckpt_path names {doubled[0]!r} twice; name each adapter once")
    named = [path for path in paths if path not in (None, BASE)]
    names = dict(zip(named, adapter_names(named), strict=True))
    return [Variant(names[path], path, lora.read(path)) if path in names else Variant(BASE) for path in paths]


@contextmanager
def adapted(backbone: Backbone, variant: Variant, scale: float) -> Iterator[None]:
    """``backbone`` with the variant's adapter, as long as the context lasts.

    Raises:
        ValueError: the adapter was made for another model.
    """
    if variant.adapter is None:
        yield
        return
    adapter = variant.adapter
    base = backbone.denoiser
    try:
        backbone.denoiser = lora.attach(base, adapter.targets, rank=adapter.rank, alpha=adapter.alpha)
    except ValueError as error:
        raise ValueError(f"the adapter {variant.path} does not fit the model: {error}") from None
    try:
        lora.load(backbone.denoiser, adapter, str(variant.path))
        lora.set_scale(backbone.denoiser, scale)
        yield
    finally:
        backbone.denoiser = backbone.denoiser.unload()


def chosen_variants(config) -> list[Variant]:
    """Variants that ``lora_ckpt_path`` and ``lora_scale`` ask for."""
    if isinstance(config.lora_ckpt_path, str):
        return read_variants([config.lora_ckpt_path if config.lora_scale > 0 else BASE])
    return read_variants(config.lora_ckpt_path or [BASE])


@dataclass(frozen=True)
class Job:
    """One variant's videos: which, into which folder, and what is recorded with them."""

    variant: Variant
    folder: Path
    samples: Sequence[Sample]
    settings: Mapping[str, Any]


def sample(config, runtime: Runtime, folder: Path) -> None:
    """Generate ``num_sample`` videos of each prompt into ``folder``, with several adapters into one folder each.

    Raises:
        IncompleteError: some videos could not be made.
    """
    variants = chosen_variants(config)
    folders = [folder / variant.name if len(variants) > 1 else folder for variant in variants]
    if runtime.is_main:
        record_environment(folder)
    make_videos(config, runtime, read_prompts(config), variants, folders)


def plan_of(config, prompts: Sequence[Prompt]) -> list[Sample]:
    """All videos of a run; a prompt's number is its line, whatever ``start_index`` leaves out."""
    return plan_samples(prompts, config.num_sample, config.seed, config.start_index or 0)


def make_videos(
    config, runtime: Runtime, prompts: Sequence[Prompt], variants: Sequence[Variant], folders: Sequence[Path]
) -> None:
    """Generate the videos of every variant, spread over the processes; those that are there already are kept.

    Raises:
        ValueError: an adapter does not fit the model; found before the first video.
        IncompleteError: some videos could not be made.
    """
    plan = plan_of(config, prompts)
    if runtime.is_main:
        for folder in folders:
            clear_partial(folder)
    jobs = []
    for variant, folder in zip(variants, folders, strict=True):
        settings = variant.settings(config)
        jobs.append(Job(variant, folder, unfinished(plan, folder, settings), settings))
    runtime.barrier()  # nobody writes before everybody has seen what there is
    total, todo = len(plan) * len(jobs), sum(len(job.samples) for job in jobs)
    if todo < total:
        logger.info("%d of %d videos are there already", total - todo, total)
    missing = todo - sum(runtime.gather_objects([run_jobs(config, runtime, prompts, jobs)])) if todo else 0
    runtime.barrier()
    if runtime.is_main:
        for folder in folders:
            tidy_manifest(folder)
    if missing:
        raise IncompleteError(
            f"{missing} of {total} videos could not be made; the reasons are above and in log.txt, and the same "
            "command makes only the missing ones"
        )
    logger.info("%d videos are in %s", total, ", ".join(map(str, folders)))


def run_jobs(config, runtime: Runtime, prompts: Sequence[Prompt], jobs: Sequence[Job]) -> int:
    """This process's share of the jobs; returns how many videos it made."""
    backbone, text = build_backbone(config, runtime, prompts)
    for job in jobs:
        with adapted(backbone, job.variant, config.lora_scale):
            pass  # an adapter of another model is refused before the first video
    shares = [job.samples[runtime.rank :: runtime.num_processes] for job in jobs]
    made = 0
    quiet = config.verbose < 1 or not runtime.is_main
    with tqdm(total=sum(map(len, shares)), desc="generating", unit="video", disable=quiet) as bar:
        for job, share in zip(jobs, shares, strict=True):
            bar.set_postfix_str(job.variant.name)
            with adapted(backbone, job.variant, config.lora_scale):
                for _ in write_videos(backbone, text, config, share, job.folder, job.settings):
                    made += 1
                    bar.update()
    return made
