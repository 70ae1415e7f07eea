"""Agreement of image and prompt in any CLIP or SigLIP (Hessel et al. 2021, arXiv:2104.08718)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from Core.rewards.base import ImageReward, RewardInfo
from Core.rewards.clip import CLIP_L14, CachedText, ImageTower, TextTower, load_clip, unit
from Core.rewards.preprocess import Fit, ImageTransform
from Core.rewards.siglip import load_siglip
from Core.rewards.tokens import CutNotice
from Core.utils.hub import Weight, locate

OPEN_CLIP = "open_clip:"


class OpenClipImage(nn.Module):
    """Preprocessing and image side of an open_clip model."""

    def __init__(self, model: nn.Module, transform: ImageTransform):
        super().__init__()
        self.model = model
        self.transform = transform

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] → unit features [N, D]."""
        dtype = next(b.dtype for b in self.model.visual.buffers() if b.is_floating_point())
        return unit(self.model.encode_image(self.transform(images).to(dtype)))


class OpenClipText(CachedText):
    """Tokenizer and text side of an open_clip model."""

    def __init__(self, model: nn.Module, tokenizer: Any):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.notice = CutNotice("the open_clip text encoder", tokenizer.context_length)

    def count(self, text: str) -> int:
        """Tokens that ``text`` has uncut."""
        if hasattr(self.tokenizer, "tokenizer"):  # open_clip's wrapper of transformers' tokenizers
            return len(self.tokenizer.tokenizer(text, verbose=False).input_ids)
        return len(self.tokenizer.encode(text)) + 2

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        for text in texts:
            self.notice.check(text, self.count(text))
        return unit(self.model.encode_text(self.tokenizer(texts).to(self.model.logit_scale.device)))


def load_open_clip(name: str, resize: Fit | None) -> tuple[OpenClipImage, OpenClipText]:
    """Towers of "architecture/pretrained", "hf-hub:owner/name" or "local-dir:folder" (open_clip's names)."""
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            f"model {OPEN_CLIP + name!r} needs the optional package: pip install 'vader-t2v[open_clip]'"
        ) from error
    architecture, pretrained = name, None
    if ":" not in name:
        architecture, _, pretrained = name.partition("/")
    model = open_clip.create_model(architecture, pretrained=pretrained or None)
    settings = model.visual.preprocess_cfg
    side = settings["size"][0] if isinstance(settings["size"], (tuple, list)) else settings["size"]
    fits: dict[str, Fit] = {"shortest": "crop", "longest": "pad", "squash": "squash"}
    transform = ImageTransform(
        height=side,
        width=side,
        fit=fits[settings["resize_mode"]],
        interpolation=settings["interpolation"],
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        round_half="even",
    )
    tokenizer = open_clip.get_tokenizer(architecture)
    return OpenClipImage(model, transform.with_fit(resize)), OpenClipText(model, tokenizer)


class ClipScore(ImageReward):
    """100 · cos(image, own prompt); loss 1 − score / 100.

    A caption longer than the model reads is cut, with a message: CLIP reads 77 tokens, SigLIP and SigLIP 2 read 64,
    Long-CLIP 248.

    Args:
        model: hub id or folder of a CLIP, Long-CLIP, SigLIP or SigLIP 2 (of fixed resolution) in the transformers
            layout, or, with the ``open_clip`` extra, "open_clip:architecture/pretrained".
        resize: as in ``pick_score``.
    """

    info = RewardInfo(
        name="clip_score",
        summary="frame-prompt similarity in any CLIP, Long-CLIP, SigLIP or SigLIP 2",
        range="-100 to 100; CLIP usually 20 to 35",
        paper="Hessel et al. 2021, arXiv:2104.08718",
        weights={"model": CLIP_L14},
    )

    def __init__(self, *, model: str = CLIP_L14.source, resize: Fit | None = None):
        super().__init__()
        if model.startswith(OPEN_CLIP):
            self.image, self.text = load_open_clip(model.removeprefix(OPEN_CLIP), resize)
            return
        folder = locate(CLIP_L14.at(model))
        self.image, self.text = load_towers(folder, resize)

    @classmethod
    def required_weights(cls, args: Mapping[str, Any]) -> dict[str, Weight]:
        # open_clip looks after its own files.
        return {} if args.get("model", "").startswith(OPEN_CLIP) else super().required_weights(args)

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 100 * (self.image(images) * self.text(prompts)).sum(dim=-1)

    def loss(self, score: Tensor) -> Tensor:
        return 1 - score / 100


def load_towers(folder: Path, resize: Fit | None) -> tuple[ImageTower, TextTower]:
    """Both halves of a folder, by the model type its config states."""
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).model_type
    if kind == "siglip":
        return load_siglip(folder, resize)
    if kind == "clip":
        return load_clip(folder, resize)[:2]
    other = "; of SigLIP 2 take a model of fixed resolution, not NaFlex" if kind == "siglip2" else ""
    raise ValueError(f"{folder} holds a {kind!r} model; clip_score takes 'clip' and 'siglip'{other}")
