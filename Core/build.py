"""From a configuration to a loaded model family: weights fetched, captions encoded, networks on their device."""

from collections.abc import Sequence

from torch import Tensor

from Core.backbones import BACKBONES, Backbone
from Core.conditioning import embed_captions
from Core.config import Config
from Core.inference import captions_of
from Core.options import ConfigError
from Core.prompts import Prompt
from Core.rewards import required_weights
from Core.runtime import Runtime
from Core.weights import Weight, locate


def build_backbone(
    config: Config, runtime: Runtime, prompts: Sequence[Prompt]
) -> tuple[Backbone, dict[str, Tensor]]:
    """The loaded model family, and the features of every caption of ``prompts``."""
    backbone = BACKBONES[config.backbone].from_config(config, runtime.device)
    fetch_weights(config, backbone, runtime)
    captions = captions_of(backbone, prompts)
    # The main process fills the cache, so that the encoder is loaded once on a machine, not once per process.
    for turn in (True, False):
        if runtime.is_main == turn:
            text = embed_captions(backbone, captions, config.text_cache)
        runtime.barrier()
    backbone.load()
    return backbone, text


def scorer_weights(config: Config) -> list[Weight]:
    """Weights of the trained reward and of the monitors."""
    weights = required_weights(config.reward_fn, config.reward_arguments)
    for name in config.monitors:
        weights = [*weights, *required_weights(name, config.monitor_args.get(name))]
    return weights


def fetch_weights(config: Config, backbone: Backbone, runtime: Runtime) -> None:
    """Bring all weights to this machine before any is loaded; what cannot be had is reported together."""
    errors = []
    if runtime.is_main:
        errors = backbone.fetch()
        for weight in scorer_weights(config) if config.is_vader_training else []:
            try:
                locate(weight)
            except FileNotFoundError as error:
                errors.append(str(error))
    errors = runtime.from_main(errors)
    if errors:
        raise ConfigError(errors)
