"""Settings of training that need less memory, those first that cost the least quality."""

from collections.abc import Mapping
from typing import Any

from Core.config import Config
from Core.config.checks import OPTIONAL_KEYS, PLACEMENTS

MEMORY_SAVERS: dict[str, Any] = {
    "grad_checkpoint": True,
    "train_batch_size": 1,
    "val_batch_size": 1,
    "backprop_mode": "last",
    "backprop_steps": 1,
    "levels_per_video": 1,
    "trajectory_device": "cpu",
    "decode_frame": -1,
    "activation_offloading": True,
    "stream_blocks": True,
    "dtype": "fp8",
    "use_AdamW8bit": True,
    "guidance_grad": "cond",
}
OF_INFERENCE = ("val_batch_size", "stream_blocks", "dtype")


def unused_savers(config: Config) -> dict[str, Any]:
    """Those that the configuration has a key for, and could still set."""
    values = config.flat()
    wanted = (
        MEMORY_SAVERS if config.run.is_vader_training else {key: MEMORY_SAVERS[key] for key in OF_INFERENCE}
    )
    # Any one frame costs the same.
    same = {"decode_frame"} if isinstance(values.get("decode_frame"), int) else set()
    models = config.models
    if models.compile_blocks or models.shard_frozen or models.base_quant != "none":
        same.add("dtype")  # would be refused beside them, and so would streaming
    if models.compile_blocks or models.shard_frozen:
        same.add("stream_blocks")
    if models.compile_blocks:
        same.add("activation_offloading")
    same |= set(OPTIONAL_KEYS) - config.backbone.obeys
    return {
        key: value
        for key, value in wanted.items()
        if key in values and key not in same and values[key] != value
    }


def needed_beside(saver: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be set with a saver that these values would refuse."""
    return {
        other: instead for other, refused, instead in PLACEMENTS.get(saver, ()) if values[other] == refused
    }
