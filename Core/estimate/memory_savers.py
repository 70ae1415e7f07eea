"""Settings of training that need less memory, those first that cost the least quality."""

from collections.abc import Mapping, Sequence
from typing import Any

from Core.config import Config
from Core.config.checks import OPTIONAL_KEYS, PLACEMENTS

MEMORY_SAVERS: Sequence[tuple[str, Any]] = (
    ("grad_checkpoint", True),
    ("train_batch_size", 1),
    ("val_batch_size", 1),
    ("backprop_mode", "last"),
    ("backprop_steps", 1),
    ("levels_per_video", 1),
    ("trajectory_device", "cpu"),
    ("decode_frame", -1),
    ("activation_offloading", True),
    ("grad_checkpoint", "parts"),
    ("stream_blocks", True),
    ("dtype", "fp8"),
    ("use_AdamW8bit", True),
    ("guidance_grad", "cond"),
)
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
