"""ImageReward v1.0: BLIP fine-tuned on human rankings of images for a prompt (Xu et al. 2023, arXiv:2304.05977).

The published file holds the names of BLIP's own code; they are converted to transformers' BLIP.

Axes: N images, L tokens, D features.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from Core.rewards.base import ImageReward, RewardInfo
from Core.rewards.heads import linear_layers
from Core.rewards.preprocess import ImageTransform
from Core.rewards.tokens import Tokens
from Core.utils.damage import read_settings
from Core.utils.hub import Weight, locate
from Core.utils.state_dict import load_state, load_strictly, load_tokenizer

CHECKPOINT, SETTINGS = "ImageReward.pt", "med_config.json"
MODEL = Weight(
    source="THUDM/ImageReward",
    kind="checkpoint",
    layouts=((CHECKPOINT, SETTINGS),),
    size=1_790_000_000,
    licence="Apache-2.0",
)
TOKENIZER = Weight(
    source="google-bert/bert-base-uncased", kind="tokenizer", size=700_000, licence="Apache-2.0"
)
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score, over the authors' data
HEAD_WIDTH = 64  # of the vision transformer's attention; a state dict does not tell
IMAGE, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
# BLIP's name → transformers' name of the vision transformer's parts.
VISION_NAMES = {
    r"cls_token": "embeddings.class_embedding",
    r"pos_embed": "embeddings.position_embedding",
    r"patch_embed\.proj": "embeddings.patch_embedding",
    r"norm\.": "post_layernorm.",
    r"blocks\.(\d+)\.norm([12])": r"encoder.layers.\1.layer_norm\2",
    r"blocks\.(\d+)\.attn\.proj": r"encoder.layers.\1.self_attn.projection",
    r"blocks\.(\d+)\.attn\.qkv": r"encoder.layers.\1.self_attn.qkv",
    r"blocks\.(\d+)\.mlp": r"encoder.layers.\1.mlp",
}
TEXT_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id"),
)


def part_of(state: Mapping[str, Tensor], prefix: str, origin: Path) -> dict[str, Tensor]:
    """Weights whose names begin with ``prefix``, without it.

    Raises:
        ValueError: there are none.
    """
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not part:
        raise ValueError(f"{origin} is not ImageReward: it has no {prefix}*; give the published {CHECKPOINT}")
    return part


def renamed_vision(key: str) -> str:
    """transformers' name of a weight of BLIP's vision transformer."""
    for pattern, name in VISION_NAMES.items():
        if match := re.match(pattern, key):
            return match.expand(name) + key[match.end() :]
    return key


def load_vision(state: Mapping[str, Tensor]) -> nn.Module:
    """``transformers.BlipVisionModel`` from the weights of BLIP's vision transformer; sizes are read off them."""
    from transformers import BlipVisionConfig, BlipVisionModel

    own = {renamed_vision(key): value for key, value in state.items()}
    patches, first = own.get("embeddings.patch_embedding.weight"), own.get("encoder.layers.0.mlp.fc1.weight")
    positions = own.get("embeddings.position_embedding")
    if patches is None or first is None or positions is None:
        raise ValueError(f"the vision transformer is not BLIP's: it has {', '.join(sorted(state)[:4])}")
    intermediate, hidden = first.shape
    patch = patches.shape[-1]
    config = BlipVisionConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=len({key.split(".")[2] for key in own if key.startswith("encoder.layers.")}),
        num_attention_heads=hidden // HEAD_WIDTH,
        image_size=round((positions.shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # BLIP's; transformers' default is another
    )
    return load_strictly(BlipVisionModel, None, config=config, state_dict=own)


def load_text(state: Mapping[str, Tensor], settings: Mapping[str, Any], width: int) -> nn.Module:
    """``transformers.BlipTextModel`` that attends to image features of ``width``."""
    from transformers import BlipTextConfig, BlipTextModel

    sizes = {key: settings[key] for key in TEXT_SIZES if key in settings}
    config = BlipTextConfig(encoder_hidden_size=width, is_decoder=True, **sizes)  # so it has cross attention
    return load_strictly(BlipTextModel, None, config=config, state_dict=dict(state), add_pooling_layer=False)


class ImageRewardV1(ImageReward):
    """Normalised score of an image for its prompt, whose first 35 tokens are read; loss −score.

    ReFL, the authors' training, stops at a score of 2; for the same, put ``hinge`` with ``target=2.0`` around this.
    Network, preprocessing and constants are those of the package ``image-reward`` 1.5; its published weights have not
    been run here.

    Args:
        model: hub id or folder with ``ImageReward.pt`` and ``med_config.json``.
        tokenizer: BERT's (uncased), as hub id or folder.
    """

    info = RewardInfo(
        name="image_reward",
        summary="BLIP fine-tuned on human rankings of images for a prompt",
        range="about -2.5 to 2",
        paper="Xu et al. 2023, arXiv:2304.05977",
        weights={"model": MODEL, "tokenizer": TOKENIZER},
    )
    full_precision = ("head",)

    def __init__(self, *, model: str = MODEL.source, tokenizer: str = TOKENIZER.source):
        super().__init__()
        folder = locate(MODEL.at(model))
        file = folder / CHECKPOINT
        state = load_state(file)
        vision = load_vision(part_of(state, IMAGE, file))
        text = load_text(
            part_of(state, TEXT, file), read_settings(folder / SETTINGS), vision.config.hidden_size
        )
        words = load_tokenizer(locate(TOKENIZER.at(tokenizer)))
        # As BLIP adds them; they do not occur in a prompt, but the embeddings have them.
        words.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        side = vision.config.image_size
        self.vision = vision
        self.text = text
        self.head = nn.Sequential(*linear_layers(part_of(state, HEAD, file), file.name))
        self.tokens = Tokens(words, MAX_TOKENS, "max_length")
        self.transform = ImageTransform(height=side, width=side, round_half="even")

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = self.transform(images).to(self.dtype)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        tokens = self.tokens(prompts).to(images.device)
        hidden = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
        ).last_hidden_state[:, 0]
        raw = self.head(hidden.to(torch.promote_types(hidden.dtype, torch.float32))).squeeze(-1)
        return (raw - MEAN) / STD
