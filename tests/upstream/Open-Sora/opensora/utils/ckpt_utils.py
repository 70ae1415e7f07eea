import os

import torch


def load_checkpoint(model, ckpt_path, save_as_pt=False, model_name="ema.pt", strict=False):
    if ckpt_path.endswith((".pt", ".pth")):
        model.load_state_dict(torch.load(ckpt_path, map_location="cpu", weights_only=True), strict=strict)
    elif os.path.isdir(ckpt_path):
        raise RuntimeError(f"colossalai finds no sharded checkpoint of its own in {ckpt_path}")
    else:
        raise ValueError(f"Invalid checkpoint path: {ckpt_path}")
