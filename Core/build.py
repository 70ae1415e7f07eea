"""From a configuration to a loaded model family: weights fetched, captions encoded, networks on their device."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from Core.backbones import BACKBONES, Backbone
from Core.config.schema import Config
from Core.data.prompts import Prompt
from Core.data.text_embeddings import embed_captions, uncached
from Core.generation.generate import captions_of
from Core.rewards import required_weights
from Core.utils.distributed import Runtime
from Core.utils.hub import locate
from Core.utils.options import ConfigError

# What ``build_reward`` takes: a name or {name: weight}, and the arguments.
Scorer = tuple[str | Mapping[str, float], Mapping[str, Any] | None]


def build_backbone(
    config: Config, runtime: Runtime, prompts: Sequence[Prompt]
) -> tuple[Backbone, dict[str, Tensor]]:
    """The loaded model family, and the features of every caption of ``prompts``."""
    backbone = BACKBONES[config.backbone].from_config(config, runtime.device)
    fetch_weights(config, backbone, runtime, prompts)
    captions = captions_of(backbone, prompts)
    # One process of a machine fills its cache, so that the encoder is loaded once and not once per process.
    for turn in (True, False):
        if runtime.is_first_on_machine == turn:
            text = _embed(config, backbone, captions)
        runtime.barrier()
    backbone.load()
    return backbone, text


def _embed(config: Config, backbone: Backbone, captions: Sequence[str]) -> dict[str, Tensor]:
    try:
        return embed_captions(backbone, captions, config.text_cache)
    except torch.OutOfMemoryError as error:
        smaller = (
            "text_encoding='8bit' or 'cpu'" if config.text_encoding == "device" else "text_encoding='cpu'"
        )
        raise MemoryError(f"the device's memory is too small for the text encoder; set {smaller}") from error


def fetch_weights(config: Config, backbone: Backbone, runtime: Runtime, prompts: Sequence[Prompt]) -> None:
    """Bring all weights to every machine before any is loaded; what cannot be had is reported together.

    The text encoder's only where some caption of ``prompts`` is not in the cache.
    """
    scorers: list[Scorer] = []
    if config.is_vader_training:
        scorers.append((config.reward_fn, config.reward_arguments))
        scorers += [(name, config.monitor_args.get(name)) for name in config.monitors]
    captions = captions_of(backbone, prompts)

    def fetch() -> list[str]:
        needed = bool(uncached(backbone, captions, config.text_cache))
        return backbone.fetch(text_encoder=needed) + fetch_scorers(scorers)

    once_per_machine(runtime, fetch)


def fetch_scorers(scorers: Iterable[Scorer]) -> list[str]:
    """Bring the weights of scorers to this machine; a sentence for each that cannot be had."""
    errors = []
    for weight in dict.fromkeys(w for name, args in scorers for w in required_weights(name, args)):
        try:
            locate(weight)
        except FileNotFoundError as error:
            errors.append(str(error))
    return errors


def once_per_machine(runtime: Runtime, fetch: Callable[[], list[str]]) -> None:
    """``fetch`` in one process of each machine, since machines may share no disk; the others wait.

    Raises:
        ConfigError: on every process, with the sentences of all machines.
    """
    errors = runtime.gather_objects(fetch() if runtime.is_first_on_machine else [])
    if errors:
        raise ConfigError(list(dict.fromkeys(errors)))
