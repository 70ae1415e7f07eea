from copy import deepcopy

import torch.nn as nn
from mmengine.registry import Registry


def build_module(module, builder, **kwargs):
    if isinstance(module, dict):
        entry = deepcopy(module)
        for key, value in kwargs.items():
            entry[key] = value
        return builder.build(entry)
    if module is None or isinstance(module, nn.Module):
        return module
    raise TypeError(f"Only support dict and nn.Module, but got {type(module)}.")


MODELS = Registry("model", locations=["opensora.models"])
SCHEDULERS = Registry("scheduler", locations=["opensora.schedulers"])
DATASETS = Registry("dataset", locations=["opensora.datasets"])
