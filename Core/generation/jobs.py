"""Inference: the videos of every prompt, for the base model or for adapters side by side."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from Core.backbones import Backbone, EncodedPrompt
from Core.build import build_backbone, commits_of_weights, new_backbone
from Core.config import BASE, Config
from Core.generation.generate import Lockstep, write_videos
from Core.generation.manifest import Sample, clear_partial, plan_samples, tidy_manifest, unfinished
from Core.modules import lora
from Core.utils.distributed import Distributed
from Core.utils.environment import record_environment
from Core.utils.errors import IncompleteError
from Core.utils.terminal import progress_bar
from Core.utils.words import counted

logger = logging.getLogger("vader")
# Folders that say nothing of which adapter it is.
GENERIC_FOLDERS = ("adapter", "checkpoints", "adapter_model")


@dataclass(frozen=True)
class Variant:
    """The base model (``adapter`` None), or an adapter on it; its videos are filed under ``name``."""

    name: str
    path: str | None = None
    adapter: lora.Adapter | None = None

    def settings(self, config: Config) -> dict[str, Any]:
        """What is recorded with each of its videos, enough to make the video again."""
        of_adapter: dict[str, Any] = {"adapter": self.path, "adapter_sha256": None, "lora_scale": None}
        if self.adapter:
            scale = config.adapter.lora_scale
            of_adapter |= {"adapter_sha256": fingerprint(self.adapter), "lora_scale": scale}
        return of_adapter | config.video_settings() | config.models.base_adapter_contents()


def fingerprint(adapter: lora.Adapter) -> str:
    """Digest of an adapter's weights and scaling: the same path may hold another adapter tomorrow."""
    digest = hashlib.sha256(f"{adapter.rank} {adapter.alpha}".encode())
    if alphas := adapter.sizes["alphas"]:
        digest.update(repr(sorted(alphas.items())).encode())
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


def read_variants(paths: Sequence[str | None], names: Mapping[str, str] = lora.NOTHING) -> list[Variant]:
    """Variants of adapter paths, read; ``base`` or None is the base model.

    Args:
        names: the model family's table of original names.

    Raises:
        FileNotFoundError, ValueError: nothing there, no adapter, or the same one twice.
    """
    doubled = [path for path in paths if paths.count(path) > 1]
    if doubled:
        raise ValueError(f"lora_ckpt_path names {doubled[0]!r} twice; name each adapter once")
    named = [path for path in paths if path not in (None, BASE)]
    labels = dict(zip(named, adapter_names(named), strict=True))
    return [
        Variant(labels[path], path, lora.read(path, names)) if path in labels else Variant(BASE)
        for path in paths
    ]


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
        backbone.denoiser = lora.attach(base, adapter.targets, **adapter.sizes)
    except ValueError as error:
        raise ValueError(f"the adapter {variant.path} does not fit the model: {error}") from None
    try:
        lora.load(backbone.denoiser, adapter, str(variant.path))
        lora.set_scale(backbone.denoiser, scale)
        yield
    finally:
        backbone.denoiser = backbone.denoiser.unload()


def chosen_variants(config: Config) -> list[Variant]:
    """Variants that ``lora_ckpt_path`` and ``lora_scale`` ask for."""
    paths = config.adapter.lora_ckpt_path
    names = config.backbone.original_names
    if isinstance(paths, str):
        return read_variants([paths if config.adapter.lora_scale > 0 else BASE], names)
    return read_variants(paths or [BASE], names)


@dataclass(frozen=True)
class Job:
    """One variant's videos: which, into which folder, and what is recorded with them."""

    variant: Variant
    folder: Path
    samples: Sequence[Sample]
    settings: Mapping[str, Any]


def sample(config: Config, distributed: Distributed, folder: Path) -> None:
    """Generate ``num_sample`` videos of each prompt into ``folder``, with several adapters into one folder each.

    Raises:
        IncompleteError: some videos could not be made.
    """
    variants = chosen_variants(config)
    folders = [folder / variant.name if len(variants) > 1 else folder for variant in variants]
    if distributed.is_main:
        record_environment(folder, commits_of_weights(config, new_backbone(config, distributed.device)))
    make_videos(config, distributed, variants, folders)


def plan_of(config: Config) -> list[Sample]:
    """All videos of a run; a prompt's number is its line, whatever ``start_index`` leaves out."""
    first = config.prompts.start_index or 0
    return plan_samples(config.prompt_list, config.run.num_sample, config.run.seed, first)


def make_videos(
    config: Config, distributed: Distributed, variants: Sequence[Variant], folders: Sequence[Path]
) -> None:
    """Generate the videos of every variant, spread over the processes; those that are there already are kept.

    Raises:
        ValueError: an adapter does not fit the model; found before the first video.
        IncompleteError: some videos could not be made.
    """
    plan = plan_of(config)
    if distributed.is_main:
        for folder in folders:
            clear_partial(folder)
    jobs = []
    for variant, folder in zip(variants, folders, strict=True):
        settings = variant.settings(config)
        jobs.append(Job(variant, folder, unfinished(plan, folder, settings, config.defaults()), settings))
    distributed.barrier()  # nobody writes before everybody has seen what there is
    total, todo = len(plan) * len(jobs), sum(len(job.samples) for job in jobs)
    if todo < total:
        logger.info("there already: %d of %s", total - todo, counted(total, "video"))
    missing = todo - sum(distributed.gather_objects([run_jobs(config, distributed, jobs)])) if todo else 0
    distributed.barrier()
    if distributed.is_main:
        for folder in folders:
            tidy_manifest(folder)
    if missing:
        raise IncompleteError(
            f"{missing} of {counted(total, 'video')} could not be made; the reasons are above and in log.txt, "
            "and the same command makes only the missing ones"
        )
    verb = "is" if total == 1 else "are"
    logger.info("%s %s in %s", counted(total, "video"), verb, ", ".join(map(str, folders)))


def lockstep(distributed: Distributed, backbone: Backbone, job: Job, text: EncodedPrompt) -> Lockstep | None:
    """As many videos for each process as the first has, where the denoiser is split; ``text`` stands in for any."""
    if backbone.mesh is None or not job.samples:
        return None
    most = -(-len(job.samples) // distributed.num_processes)
    return Lockstep(most, (job.samples[0], text), distributed.any)


def run_jobs(config: Config, distributed: Distributed, jobs: Sequence[Job]) -> int:
    """This process's share of the jobs; returns how many videos it made."""
    backbone, encoded = build_backbone(config, distributed, config.prompt_list)
    first, scale = config.prompts.start_index or 0, config.adapter.lora_scale
    for job in jobs:
        with adapted(backbone, job.variant, scale):
            pass  # an adapter of another model is refused before the first video
    shares = [job.samples[distributed.rank :: distributed.num_processes] for job in jobs]
    made = 0
    with progress_bar(hidden=config.run.verbose < 1 or not distributed.is_main) as bar:
        task = bar.add_task("generating", total=sum(map(len, shares)))
        for job, share in zip(jobs, shares, strict=True):
            bar.update(task, description=f"generating, {job.variant.name}")
            texts = [encoded[sample.index - first] for sample in share]
            with adapted(backbone, job.variant, scale):
                for video in write_videos(
                    backbone, share, texts, job.folder, job.settings,
                    files=config.video, batch_size=config.validation.val_batch_size,
                    progress=config.run.verbose >= 2, lockstep=lockstep(distributed, backbone, job, encoded[0]),
                ):  # fmt: skip
                    if video.path:
                        made += 1
                        bar.advance(task)
    return made
