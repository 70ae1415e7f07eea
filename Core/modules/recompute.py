"""Activation checkpointing of functions, and of the parts of blocks that are checkpointed already."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Run = TypeVar("Run", bound=Callable[..., Any])


def recomputed(function: Run) -> Run:
    """``function`` that keeps its inputs alone where there is a graph, and is run again in the backward pass."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        # PyTorch keeps what is given by name out of sight of hooks, such as those of a checkpoint around this one.
        by_place = functools.partial(_by_place, function, len(args), tuple(kwargs))
        return checkpoint(by_place, *args, *kwargs.values(), use_reentrant=False)

    return run  # type: ignore[return-value]


def _by_place(function: Callable[..., Any], count: int, names: Sequence[str], *values: Any) -> Any:
    """``function`` of ``count`` values by place and the rest by name."""
    return function(*values[:count], **dict(zip(names, values[count:], strict=True)))


def recompute_parts(blocks: Iterable[nn.Module]) -> None:
    """Have attention and feed-forward network of every block recomputed by themselves.

    Where the block is recomputed too, its backward pass holds the graph of one part at a time, and each part runs a
    third time. A part is a child with several linear layers, to be told before adapters add theirs.
    """
    for block in blocks:
        for part in block.children():
            if sum(isinstance(module, nn.Linear) for module in part.modules()) > 1:
                part.forward = recomputed(part.forward)
