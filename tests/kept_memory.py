"""What stays in memory for a backward pass, with what checkpoints recompute from."""

from typing import Any

import torch
import torch.utils.checkpoint
from pipelines import saved_bytes
from torch.utils._pytree import tree_leaves

PLACES = ("torch.utils.checkpoint.checkpoint", "Core.modules.video_decode.checkpoint")


def kept_bytes(monkeypatch: Any, compute: Any) -> int:
    """Bytes of the tensors that autograd saves in ``compute()``, and of the inputs of its outermost checkpoints."""
    kept, depth, plain = 0, 0, torch.utils.checkpoint.checkpoint

    def checkpoint(function: Any, *inputs: Any, **settings: Any) -> Any:
        nonlocal kept, depth
        if depth == 0:
            kept += sum(leaf.nbytes for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
        depth += 1
        try:
            return plain(function, *inputs, **settings)
        finally:
            depth -= 1

    with monkeypatch.context() as patch:
        for place in PLACES:
            patch.setattr(place, checkpoint)
        saved, _ = saved_bytes(compute)
    return saved + kept
