"""Parts of a network that compute in their weights' own dtype, whatever autocast is on around them."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn


def keep_out_of_autocast(network: nn.Module, names: Iterable[str]) -> None:
    """Have the linear layers and convolutions below modules of these names computed without autocast.

    Args:
        names: of modules anywhere in ``network``, such as ``time_embedder``.
    """
    wanted = set(names)
    for path, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) and wanted & set(path.split(".")):
            module.forward = partial(_without_autocast, module.forward)


def _without_autocast(forward: Callable[..., Any], x: torch.Tensor) -> Any:
    with torch.autocast(x.device.type, enabled=False):
        return forward(x)
