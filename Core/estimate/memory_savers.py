"""Settings of training that need less memory.

Those that leave the training as it is come first, then those that change it, the least change first.
"""

from collections.abc import Mapping
from typing import Any

from Core.config import Config
from Core.config.checks import OPTIONAL_KEYS, PLACEMENTS

# The text encoder has the card to itself, before anything else is loaded; nothing but this lowers its peak.
TEXT_SAVER = ("text_encoding", "cpu")
# Key and value → what it does.
MEMORY_SAVERS: dict[tuple[str, Any], str] = {
    ("grad_checkpoint", True): "the same training; activations are computed twice",
    ("train_batch_size", 1): "the same training with more gradient_accumulation_steps",
    ("val_batch_size", 1): "the same videos, one at a time",
    ("trajectory_device", "cpu"): "the same training; sampled steps are kept in the CPU's memory",
    ("activation_offloading", True): "the same training; inputs of blocks are kept in the CPU's memory",
    ("grad_checkpoint", "parts"): "the same training; attention and feed-forward networks run once more",
    ("stream_blocks", True): "the same training; frozen weights come from the CPU's memory block by block",
    ("use_AdamW8bit", True): "the optimiser's state in 8 bits",
    ("levels_per_video", 1): "one noise level of each sampled video is trained on",
    ("decode_frame", -1): "one latent frame, drawn anew each time, is decoded and scored",
    ("backprop_mode", "last"): "the gradient goes through the last sampling steps alone",
    ("backprop_steps", 1): "the gradient goes through one sampling step",
    ("dtype", "fp8"): "the frozen denoiser in 8 bits, computing in bf16",
    ("guidance_grad", "cond"): "no gradient through guidance's unconditional prediction",
}
EFFECTS = MEMORY_SAVERS | {TEXT_SAVER: "captions are encoded on the CPU, before training"}
OF_INFERENCE = ("val_batch_size", "stream_blocks", "dtype")


def unused_savers(config: Config) -> list[tuple[str, Any]]:
    """Keys and values of those that the configuration could still set, in order."""
    values, training = config.flat(), config.run.is_vader_training
    refused = _refused(config)
    return [
        (key, value)
        for key, value in MEMORY_SAVERS
        if key in values
        and values[key] != value
        and (training or key in OF_INFERENCE)
        and key not in refused
        and (key, value) not in refused
    ]


def _refused(config: Config) -> set[str | tuple[str, Any]]:
    """Keys, or keys with a value, that would change nothing or be refused beside what is set."""
    models, refused = config.models, set[str | tuple[str, Any]](set(OPTIONAL_KEYS) - config.backbone.obeys)
    if isinstance(config.flat().get("decode_frame"), int):
        refused.add("decode_frame")  # any one frame costs the same
    if models.grad_checkpoint == "parts":
        refused.add(("grad_checkpoint", True))
    if models.compile_blocks or "parts" not in config.backbone.recomputations:
        refused.add(("grad_checkpoint", "parts"))
    if models.compile_blocks or models.shard_frozen or models.base_quant != "none":
        refused.add("dtype")  # and so would streaming
    if models.compile_blocks or models.shard_frozen:
        refused.add("stream_blocks")
    if models.compile_blocks:
        refused.add("activation_offloading")
    return refused


def needed_beside(saver: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be set with a saver that these values would refuse."""
    return {
        other: instead for other, refused, instead in PLACEMENTS.get(saver, ()) if values[other] == refused
    }
