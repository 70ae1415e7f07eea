"""Work without a gradient that repeats: it is run once for inputs of a kind, and counted from then on.

A sampling step repeats the one before, a block of the denoiser the others, and a chunk or tile of the decoder those of
its size. Work that keeps a graph is always run.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from Core.estimate.live_bytes import LiveBytes
from Core.estimate.operations import Work, WorkCounter
from Core.sampling.euler import Predict

CHUNKS_RUN = 4  # of a video, before the one that stands for the rest: the first ones see less of those before
RECORDED = 3  # the prediction that stands for later ones
PLAIN = (bool, int, float, str, torch.dtype, type(None))


@dataclass(frozen=True)
class Recorded:
    """What a call did.

    work: its operators. height: bytes by which it raised the live ones at most. out: its result, on the meta device.
    """

    work: Counter[Work]
    height: int
    out: Any


class Repeats:
    """Calls by what they do, which is told by a key and by the arguments."""

    def __init__(self, live: LiveBytes, work: WorkCounter):
        self.live, self.work = live, work
        self.recorded: dict[Hashable, Recorded] = {}

    def call(self, key: Hashable, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function``'s result, or tensors of its shapes if it was called like this before."""
        key = (key, torch.is_autocast_enabled("cpu"), _kinds((args, kwargs)))
        if (known := self.recorded.get(key)) is None:
            before = Counter(self.work.now)
            out, height = self.live.height_of(lambda: function(*args, **kwargs))
            self.recorded[key] = Recorded(self.work.now - before, height, _empty_on("meta", out))
            return out
        self.work.now.update(known.work)
        self.live.reach(known.height)
        return _empty_on("cpu", known.out)


def _kinds(values: Any) -> Hashable:
    """What tells arguments apart that make for different work."""
    leaves, structure = tree_flatten(values)
    kinds = ((x.shape, x.dtype) if isinstance(x, Tensor) else isinstance(x, PLAIN) and x for x in leaves)
    return structure, tuple(kinds)


def _empty_on(device: str, values: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device=device), values)


class RepeatedPrediction:
    """A prediction that is the same work at every step of an expert, from the third on.

    The first also makes what all share. After the second, as much stays on the card as after any other.

    Args:
        expert_at: tells the experts apart, by timesteps [B].
    """

    def __init__(self, predict: Predict, repeats: Repeats, expert_at: Callable[[Tensor], Hashable]):
        self.predict, self.repeats, self.expert_at = predict, repeats, expert_at
        self.key = object()  # what is recorded must not keep the text that a prediction holds
        self.runs: Counter[Hashable] = Counter()

    def __call__(self, z: Tensor, t: Tensor, generated: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return self.predict(z, t, generated)
        expert = self.expert_at(t)
        self.runs[expert] += 1
        if self.runs[expert] < RECORDED:
            return self.predict(z, t, generated)
        return self.repeats.call((self.key, expert), self.predict, z, t, generated)


class RepeatedBlock:
    """A block that is the same work as others like it; its first run also makes what its later ones share.

    Attributes:
        begun: that first run is over.
    """

    def __init__(self, block: nn.Module, repeats: Repeats):
        self.block, self.forward, self.repeats = block, block.forward, repeats
        self.begun = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or not self.begun:
            self.begun |= not torch.is_grad_enabled()
            return self.forward(*args, **kwargs)
        return self.repeats.call(_structure(self.block), self.forward, *args, **kwargs)


def _structure(block: nn.Module) -> Hashable:
    """What tells blocks apart that do different work; a module's own ``forward`` may be another than its class's."""
    return tuple(
        (
            type(module),
            "forward" in vars(module),
            *((name, value) for name, value in vars(module).items() if isinstance(value, PLAIN)),
            *((name, weight.shape, weight.dtype) for name, weight in module.named_parameters(recurse=False)),
        )
        for module in block.modules()
    )


class RepeatedChunk:
    """A step of a decoder that keeps a cache; the fifth chunk of a video stands for all later ones but the last.

    A cache that grows with the video is then counted as after the fourth.
    """

    def __init__(self, step: Any, repeats: Repeats):
        self.step, self.repeats = step, repeats
        self.chunk = 0

    def __call__(self, z: Tensor, cache: Any, last: bool = False) -> tuple[Tensor, Any]:
        if torch.is_grad_enabled():
            return self.step(z, cache, last=last)
        self.chunk = 0 if cache is None else self.chunk + 1
        if self.chunk < CHUNKS_RUN:
            return self.repeats.call("chunk", self.step, z, cache, last=last)
        key = ("later chunk", z.shape, z.dtype, last)
        return self.repeats.call(key, lambda: self.step(z, cache, last=last)[0]), cache
