"""The configuration: users write flat keys, the program reads typed sections.

Each key is a field of one section, with its default, help, range and effects beside it. Two sections are chosen by
keys of others: ``family`` by ``backbone``, and ``objective`` by ``objective``.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from Core.backbones import (
    BACKBONES,
    Backbone,
    FamilySettings,
    ModelSettings,
    Prompt,
    VideoSettings,
    VideoSpec,
)
from Core.data.prompts import PromptSettings, read_prompts, read_validation_prompts
from Core.rewards.settings import RewardSettings
from Core.training.objectives import OBJECTIVES, Objective, ObjectiveSettings
from Core.utils.errors import ConfigError
from Core.utils.files import write_whole
from Core.utils.options import default_of, free_option, option

BASE = "base"  # stands for the model without an adapter wherever adapters are listed


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The LoRA adapter."""

    lora_rank: int = option(16, "rank of the adapter", minimum=1, maximum=1 << 12)
    lora_alpha: int = option(
        8, "the adapter's output is scaled by lora_alpha / lora_rank", minimum=1, maximum=1 << 16
    )
    lora_dropout: float = option(0.0, "dropout of the adapter's input while training", minimum=0, below=1)
    lora_targets: list[str] | None = option(
        None,
        "name suffixes of the layers to adapt, linear or convolution; None = those of lora_ckpt_path, or the family's",
    )
    lora_ckpt_path: str | list[str] | None = option(
        None,
        "adapter to start from or to sample with (PEFT, diffusers, ComfyUI, kohya); inference takes several, `base` "
        "being the plain model",
        path=True,
    )
    lora_scale: float = free_option(
        1.0, "strength of the adapter in inference; 0 turns it off", minimum=0, maximum=1000
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Steps of training and how each is taken."""

    objective: str = option("reward_gradient", "training objective")
    lr: float = option(2e-4, "learning rate of AdamW", above=0, maximum=1000)
    lr_schedule: Literal["constant", "cosine", "linear"] = option(
        "constant", "learning rate schedule after warm-up"
    )
    lr_warmup_steps: int = option(0, "optimiser steps of linear warm-up", minimum=0)
    ema_decay: float = option(
        0.0,
        "decay of the adapter's moving average, which is then validated and exported; 0 = off",
        minimum=0,
        below=1,
    )
    adam_betas: tuple[float, float] = option((0.9, 0.999), "betas of AdamW", minimum=0, below=1)
    weight_decay: float = option(0.01, "weight decay of AdamW", minimum=0, maximum=1000)
    use_AdamW8bit: bool = option(False, "keep the optimiser state in 8 bits (bitsandbytes)")
    max_grad_norm: float = option(1.0, "gradient norm to clip to", above=0)
    train_batch_size: int = free_option(1, "videos per process and backward pass", minimum=1, maximum=1 << 16)
    gradient_accumulation_steps: int = free_option(
        8, "backward passes per optimiser step", minimum=1, maximum=1 << 16
    )
    num_train_epochs: int = free_option(200, "maximum number of passes over the prompts", minimum=1)
    max_train_steps: int = free_option(800, "maximum number of optimiser steps", minimum=1)
    mixed_precision: Literal["bf16", "fp16", "no", "fp8"] = option(
        "bf16", "autocast dtype of training; `fp8` needs hardware kernels and is refused"
    )
    max_bad_steps: int = free_option(
        10, "stop after this many steps in a row whose gradient is not finite, or exactly zero", minimum=1
    )

    def global_batch(self, num_processes: int) -> int:
        """Samples of one optimiser step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * num_processes


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What to do, and where."""

    is_vader_training: bool = option(True, "train; False generates videos")
    num_sample: int = free_option(
        1, "videos per prompt, with seeds from `seed` upwards", minimum=1, maximum=1 << 16
    )
    seed: int = option(200, "seed of every random draw", minimum=0, maximum=(1 << 63) - 1)
    project_dir: str = free_option("runs/vader", "folder of the run", path=True)
    checkpointing_steps: int = free_option(50, "optimiser steps between checkpoints", minimum=1)
    keep_checkpoints: int = free_option(
        2, "number of newest checkpoints to keep, besides the best by validation", minimum=1
    )
    resume: str = free_option(
        "auto",
        "`auto` continues the run in project_dir, `never` starts over; or a checkpoint folder",
        path=True,
    )
    verbose: int = free_option(
        1, "0 quiet, 1 progress, 2 also the progress of each sample", minimum=0, maximum=2
    )
    check_only: bool | int = free_option(
        False,
        "check the configuration, download the weights, and stop; a number also checks the global batch of that many "
        "processes",
        minimum=1,
        maximum=1 << 20,
    )
    debug: bool = free_option(
        False, "find the operation behind a NaN (slow), one validation batch, no tracker"
    )


# Measured on every validation video that moves, or at every validation with several seeds, without being asked for.
ALWAYS_MONITORED = ("motion", "dynamic_degree", "diversity")


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Keys of ``early_stop``."""

    monitor: str = option("", "`reward`, `motion`, `diversity`, `dynamic_degree` or the name of a monitor")
    fall: float = option(0.0, "tolerated fall below its best, as a share of the best", minimum=0, below=1)
    patience: int = option(3, "validations in a row below that before the run stops", minimum=1)


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Videos of fixed prompts and seeds, and what is measured on them."""

    validation_steps: int = free_option(10, "optimiser steps between validations", minimum=1)
    val_batch_size: int = free_option(1, "videos generated at once", minimum=1, maximum=1 << 16)
    num_val_runs: int = free_option(2, "batches per validation", minimum=1, maximum=1 << 16)
    num_val_seeds: int = free_option(
        1, "videos per validation prompt; 2 or more also measure diversity", minimum=1, maximum=1 << 16
    )
    monitors: list[str] = free_option(
        [], "rewards to measure on the validation videos, besides motion, dynamic_degree and diversity"
    )
    monitor_args: dict = free_option({}, "arguments of the monitors, {name: arguments}")
    early_stop: dict | None = free_option(
        None,
        "stop when a monitor falls: dict(monitor=name, fall=share of its best, patience=validations)",
        entry=EarlyStop,
    )
    is_sample_preview: bool = free_option(
        False, "at each validation, save the frames that the last step was trained on"
    )


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """Experiment trackers beside the CSV files."""

    logger_type: Literal["wandb", "tensorboard"] = free_option("wandb", "tracker besides metrics.csv")
    use_wandb: bool = free_option(False, "start wandb when logger_type is wandb")
    wandb_entity: str | None = free_option(None, "wandb user or team")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A configuration by section; ``build_config`` makes a checked one from flat keys.

    Attributes:
        family, objective: settings of the chosen model family and objective.
    """

    video: VideoSettings = field(default_factory=VideoSettings)
    models: ModelSettings = field(default_factory=ModelSettings)
    family: FamilySettings
    prompts: PromptSettings = field(default_factory=PromptSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    objective: ObjectiveSettings
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    run: RunSettings = field(default_factory=RunSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Config":
        """The sections of flat keys whose types are right; what else may be wrong is not looked at.

        Raises:
            ValueError: no such family or objective.
        """
        sections = {}
        for name, schema in sections_of(values).items():
            keys = {entry.name for entry in dataclasses.fields(schema)}
            sections[name] = schema(**{key: value for key, value in values.items() if key in keys})
        return cls(**sections)

    @property
    def backbone(self) -> type[Backbone]:
        return BACKBONES.resolve(self.models.backbone)

    @property
    def objective_class(self) -> type[Objective]:
        return OBJECTIVES.resolve(self.optimizer.objective)

    @functools.cached_property
    def video_spec(self) -> VideoSpec:
        return self.backbone.video_spec(self.video)

    @functools.cached_property
    def denoiser_shapes(self) -> Mapping[str, Sequence[int]]:
        """Shape of each of the denoiser's weights by name, as far as files on this machine say."""
        return self.backbone.denoiser_shapes(self.family)

    @functools.cached_property
    def prompt_list(self) -> list[Prompt]:
        """The prompts of the run, parsed."""
        parse = functools.partial(self.backbone.parse_prompts, settings=self.family)
        return read_prompts(self.prompts, parse)

    @functools.cached_property
    def validation_prompt_list(self) -> list[Prompt]:
        """``num_val_runs`` × ``val_batch_size`` prompts of the validation."""
        count = self.validation.val_batch_size * (1 if self.run.debug else self.validation.num_val_runs)
        return read_validation_prompts(self.prompts, self.backbone.parse_prompts, self.prompt_list, count)

    def fields(self) -> Iterator[tuple[dataclasses.Field, Any]]:
        """Every key with its value."""
        for section in dataclasses.fields(self):
            settings = getattr(self, section.name)
            for entry in dataclasses.fields(settings):
                yield entry, getattr(settings, entry.name)

    def flat(self) -> dict[str, Any]:
        """The configuration as the keys of a file."""
        return {entry.name: value for entry, value in self.fields()}

    def defaults(self) -> dict[str, Any]:
        """The default of each of its keys."""
        return {entry.name: default_of(entry) for entry, _ in self.fields()}

    def video_settings(self) -> dict[str, Any]:
        """The keys that a generated video depends on, besides prompt, seed and adapter."""
        return {entry.name: value for entry, value in self.fields() if entry.metadata["remakes_videos"]}

    def fixed_keys(self) -> frozenset[str]:
        """The keys that a resumed run must not change."""
        fixed = {entry.name for entry, _ in self.fields() if not entry.metadata["may_change"]}
        if self.optimizer.lr_schedule != "constant":
            fixed |= {"max_train_steps", "num_train_epochs"}  # they stretch the schedule
        return frozenset(fixed)

    def save(self, path: Path) -> None:
        """Write a config file that gives this configuration again, and the same as JSON beside it."""
        write_whole(path, "".join(f"{key} = {value!r}\n" for key, value in self.flat().items()))
        write_whole(path.with_suffix(".json"), json.dumps(self.flat(), indent=1, ensure_ascii=False) + "\n")


def sections_of(values: Mapping[str, Any]) -> dict[str, type]:
    """Name → dataclass of each section, for the family and the objective that flat keys choose.

    Raises:
        ValueError: no such family or objective.
    """
    schemas: dict[str, Any] = {section.name: section.type for section in dataclasses.fields(Config)}
    family = values.get("backbone", ModelSettings().backbone)
    objective = values.get("objective", OptimizerSettings().objective)
    schemas["family"] = BACKBONES.resolve(family).settings_class
    schemas["objective"] = OBJECTIVES.resolve(objective).settings_class
    return schemas


def keys_of(schemas: Mapping[str, type]) -> dict[str, dataclasses.Field]:
    """Every key of some sections with its field."""
    return {entry.name: entry for schema in schemas.values() for entry in dataclasses.fields(schema)}


__all__ = ["BASE", "Config", "ConfigError", "keys_of", "sections_of"]
