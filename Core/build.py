"""From a configuration to a loaded model family: weights fetched, captions encoded, networks on their device."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from Core.backbones import Backbone, Prompt
from Core.config import Config, ConfigError
from Core.config.checks import machine_errors
from Core.data.text_embeddings import EncodedPrompts, all_cached, encode_prompts
from Core.modules import sharding
from Core.rewards import required_weights
from Core.utils.distributed import Distributed
from Core.utils.hub import commit_of, prefetch
from Core.utils.terminal import status

logger = logging.getLogger("vader")
# What ``build_reward`` takes: a name or {name: weight}, and the arguments.
Scorer = tuple[str | Mapping[str, float], Mapping[str, Any] | None]


def new_backbone(config: Config, device: torch.device) -> Backbone:
    """The model family that a configuration names, with nothing loaded."""
    return config.backbone(config.family, config.models, config.video_spec, device)


def build_backbone(
    config: Config, distributed: Distributed, prompts: Sequence[Prompt], used: Sequence[Prompt] | None = None
) -> tuple[Backbone, EncodedPrompts]:
    """The loaded model family, and the prompts with the features of those that are ``used``, by default all."""
    with status("loading the model …", shown=distributed.is_main and config.run.verbose > 0):
        return _build_backbone(config, distributed, prompts, used)


def _build_backbone(
    config: Config, distributed: Distributed, prompts: Sequence[Prompt], used: Sequence[Prompt] | None
) -> tuple[Backbone, EncodedPrompts]:
    backbone = new_backbone(config, distributed.device)
    backbone.mesh = distributed.mesh if config.models.shard_frozen else None
    fetch_weights(config, backbone, distributed, used or prompts)
    # One process of a machine fills its cache, so that the encoder is loaded once and not once per process.
    for turn in (True, False):
        if distributed.is_first_on_machine == turn:
            encoded = _encode(config, backbone, prompts, used, distributed.is_main)
        distributed.barrier()
    with backbone.loading("the model", backbone.weights.keys() - set(backbone.text_weights)):
        backbone.load()
    if backbone.mesh is not None:
        held = sharding.held_bytes(backbone.denoiser)
        logger.info(
            "the denoiser is split over %d processes: %d MB here", distributed.num_processes, held >> 20
        )
    return backbone, encoded


def refuse_machine(config: Config, distributed: Distributed) -> None:
    """Raise ConfigError where the configuration cannot be had with the processes and the device that there are."""
    if errors := machine_errors(config, distributed.num_processes, distributed.device.type):
        raise ConfigError(errors)


def _encode(
    config: Config,
    backbone: Backbone,
    prompts: Sequence[Prompt],
    used: Sequence[Prompt] | None,
    is_main: bool,
) -> EncodedPrompts:
    try:
        shown = is_main and config.run.verbose > 0
        return encode_prompts(backbone, prompts, config.models.text_cache, used, shown)
    except torch.OutOfMemoryError as error:
        on_device = config.models.text_encoding == "device"
        smaller = "text_encoding='8bit' or 'cpu'" if on_device else "text_encoding='cpu'"
        raise MemoryError(f"the device's memory is too small for the text encoder; set {smaller}") from error


def fetch_weights(
    config: Config, backbone: Backbone, distributed: Distributed, prompts: Sequence[Prompt]
) -> None:
    """Bring all weights to every machine before any is loaded; what cannot be had is reported together.

    The text encoder's only where some caption of ``prompts`` is not in the cache.
    """

    def fetch() -> list[str]:
        cached = all_cached(backbone, prompts, config.models.text_cache)
        return backbone.fetch(text_encoder=not cached) + fetch_scorers(scorers_of(config))

    once_per_machine(distributed, fetch)


def scorers_of(config: Config) -> list[Scorer]:
    """The trained reward and the monitors; none where a configuration only generates."""
    if not config.run.is_vader_training:
        return []
    arguments = config.validation.monitor_args
    monitors = [(name, arguments.get(name)) for name in config.validation.monitors]
    return [(config.reward.reward_fn, config.reward.arguments), *monitors]


def commits_of_weights(config: Config, backbone: Backbone) -> dict[str, str]:
    """Commits of the weights that come from the hub, by key of the configuration or name of the reward."""
    weights = dict(backbone.weights_of(backbone.settings))
    for scorer in scorers_of(config):
        weights |= {f"reward {weight.source}": weight for weight in required_weights(*scorer)}
    return {key: commit for key, weight in weights.items() if (commit := commit_of(weight))}


def fetch_scorers(scorers: Iterable[Scorer]) -> list[str]:
    """Bring the weights of scorers to this machine; a sentence on those that cannot be had."""
    try:
        prefetch(weight for name, args in scorers for weight in required_weights(name, args))
    except FileNotFoundError as error:
        return [str(error)]
    return []


def once_per_machine(distributed: Distributed, fetch: Callable[[], list[str]]) -> None:
    """``fetch`` in one process of each machine, since machines may share no disk; the others wait.

    Raises:
        ConfigError: on every process, with the sentences of all machines.
    """
    errors = distributed.gather_objects(fetch() if distributed.is_first_on_machine else [])
    if errors:
        raise ConfigError(list(dict.fromkeys(errors)))
