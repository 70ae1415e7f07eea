"""Golden data of open_clip: `open_clip_tiny.safetensors` and `open_clip_vit_h14.json` beside this file.

Needs `pip install open_clip_torch` (with torchvision), which the project itself does without:

    PYTHONPATH=tests python tests/golden/make_open_clip.py

The tiny model has the weights of `reward_twins.open_clip_state()`. open_clip itself preprocesses the 8-bit
images and computes the features, with HPSv2's settings (longest side, black border) and with CLIP's own.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

# With a CPU build of torch, torchvision finds these two operators missing when it is imported.
library = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip  # noqa: E402
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg  # noqa: E402
from open_clip.transform import image_transform  # noqa: E402
from PIL import Image  # noqa: E402
from reward_twins import clip_tokenizer, open_clip_state, smooth_images  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

FOLDER = Path(__file__).parent
PROMPTS = ["a red fox", "two dogs on a beach", "rain"]
SIZES = {"exact": (16, 16), "wide": (40, 72), "tall": (72, 40)}


def tiny_model() -> CLIP:
    """The twin as open_clip builds it."""
    vision = CLIPVisionCfg(layers=2, width=80, head_width=80, mlp_ratio=2.0, patch_size=8, image_size=16)
    text = CLIPTextCfg(
        context_length=24, vocab_size=len(clip_tokenizer()), width=64, heads=1, layers=2, mlp_ratio=2.0
    )
    model = CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text).eval()
    model.load_state_dict(open_clip_state(), strict=True)
    return model


def main() -> None:
    model, tokenizer = tiny_model(), clip_tokenizer()
    ids = tokenizer(PROMPTS, padding="max_length", max_length=24, return_tensors="pt")
    data = {"checksum": torch.stack([value.double().abs().sum() for value in open_clip_state().values()])}
    with torch.no_grad():
        # open_clip pads with 0.
        data["text"] = model.encode_text(ids.input_ids * ids.attention_mask, normalize=True)
        for name, size in SIZES.items():
            images = smooth_images(len(PROMPTS), size)
            data[f"{name}.images"] = images
            pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
            for mode in ("longest", "shortest"):
                transform = image_transform(16, is_train=False, resize_mode=mode, interpolation="bicubic")
                pixels = torch.stack([transform(picture) for picture in pictures])
                data[f"{name}.{mode}"] = model.encode_image(pixels, normalize=True)
    metadata = {"prompts": json.dumps(PROMPTS), "open_clip": open_clip.__version__}
    save_file({k: v.contiguous() for k, v in data.items()}, FOLDER / "open_clip_tiny.safetensors", metadata)

    full = open_clip.create_model("ViT-H-14", device="meta").state_dict()
    manifest = {key: list(value.shape) for key, value in full.items()}
    (FOLDER / "open_clip_vit_h14.json").write_text(json.dumps(manifest, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
