"""Registries through which mmengine config files name models and schedulers."""

from copy import deepcopy

from mmengine.registry import Registry
from torch import nn

MODELS = Registry("model", locations=["opensora.models"])
SCHEDULERS = Registry("scheduler", locations=["opensora.schedulers"])


def build_module(module: dict | nn.Module | None, builder: Registry, **kwargs):
    """Build what a config entry describes.

    Args:
        module: ``dict(type=…, …)``; a module that is already built, or None, is returned as it is.
        builder: registry that knows ``module["type"]``.
        **kwargs: arguments that override those of the entry.
    """
    if module is None or isinstance(module, nn.Module):
        return module
    if not isinstance(module, dict):
        raise TypeError(f"expected a config dict, a module or None, got {type(module).__name__}")
    return builder.build({**deepcopy(dict(module)), **kwargs})
