"""Human Preference Score v2 (Wu et al. 2023, arXiv:2306.09341): open_clip's ViT-H-14, fine-tuned.

The published files hold open_clip's parameter names; they are converted to ``transformers.CLIPModel``.
"""

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from Core.rewards.base import ImageReward, RewardInfo
from Core.rewards.clip import ImageTower, TextTower
from Core.rewards.preprocess import ImageTransform, Interpolation
from Core.utils.hub import Weight, locate
from Core.utils.state_dict import load_state, load_strictly, load_tokenizer

DEFAULT_VERSION: Literal["v2.0", "v2.1"] = "v2.1"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
HEAD_WIDTH = {"vision": 80, "text": 64}  # of ViT-H-14; a state dict does not tell
TOKENIZER = Weight(
    source="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", kind="tokenizer", size=3_700_000, licence="MIT"
)

# open_clip's name → transformers' name, outside and inside a block.
OUTER_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
FIRST_BLOCKS = [f"{side}_model.encoder.layers.0.mlp.fc1.weight" for side in HEAD_WIDTH]
TRANSPOSED = {"visual.proj", "text_projection"}  # stored as [in, out]
INNER_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
PREFIX = re.compile(r"(module\.)?(text\.)?")  # of a wrapped model, and of open_clip's other text layout
BUFFER = re.compile(r"(.*\.)?(attn_mask|position_ids)")  # constants that some files hold
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def convert_state(state: Mapping[str, Tensor], origin: str | Path) -> dict[str, Tensor]:
    """Parameters of an open_clip ViT CLIP under the names of ``transformers.CLIPModel``.

    Args:
        origin: how error messages call the file.

    Raises:
        ValueError: keys that are not of that layout, or missing; the message names them.
    """
    converted, unknown = {}, []
    for given, value in state.items():
        if BUFFER.fullmatch(given):
            continue
        key = PREFIX.sub("", given, count=1)
        block = BLOCK.fullmatch(key)
        if key in OUTER_NAMES:
            converted[OUTER_NAMES[key]] = value.T.contiguous() if key in TRANSPOSED else value
        elif block:
            vision, index, name, part = block.groups()
            prefix = f"{'vision' if vision else 'text'}_model.encoder.layers.{index}."
            if name == "attn.in_proj":
                for letter, third in zip("qkv", value.chunk(3), strict=True):
                    converted[f"{prefix}self_attn.{letter}_proj.{part}"] = third.contiguous()
            elif name in INNER_NAMES:
                converted[f"{prefix}{INNER_NAMES[name]}.{part}"] = value
            else:
                unknown.append(key)
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{origin} is not an open_clip ViT CLIP: unknown keys {', '.join(unknown[:5])}")
    if absent := sorted({*OUTER_NAMES.values(), *FIRST_BLOCKS} - set(converted)):
        raise ValueError(f"{origin} is not an open_clip ViT CLIP: it has no {', '.join(absent[:5])}")
    return converted


def infer_config(state: Mapping[str, Tensor]) -> Any:
    """``CLIPConfig`` of a converted state dict: sizes are read off the shapes, heads have ViT-H-14's width."""
    from transformers import CLIPConfig

    def tower(side: str) -> dict[str, Any]:
        layers = {key.split(".")[3] for key in state if key.startswith(f"{side}_model.encoder.layers.")}
        intermediate, hidden = state[f"{side}_model.encoder.layers.0.mlp.fc1.weight"].shape
        sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": len(layers)}
        return sizes | {"num_attention_heads": hidden // HEAD_WIDTH[side], "hidden_act": "gelu"}

    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    positions = state["vision_model.embeddings.position_embedding.weight"].shape[0]
    projection = state["visual_projection.weight"].shape[0]
    vision = {
        "patch_size": patch,
        "image_size": round((positions - 1) ** 0.5) * patch,
        "projection_dim": projection,
    }
    vocabulary, _ = state["text_model.embeddings.token_embedding.weight"].shape
    length, _ = state["text_model.embeddings.position_embedding.weight"].shape
    # eos_token_id 2 makes transformers pool at the largest id, which is open_clip's rule as well.
    text = {"vocab_size": vocabulary, "max_position_embeddings": length, "eos_token_id": 2}
    text["projection_dim"] = projection
    return CLIPConfig(
        text_config=tower("text") | text, vision_config=tower("vision") | vision, projection_dim=projection
    )


def clean_text(text: str) -> str:
    """What open_clip's tokenizer does to a text first: mends its encoding and quotes, and lower-cases it."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def load_open_clip_file(path: Path) -> Any:
    """``transformers.CLIPModel`` from a file with open_clip's parameter names, strict on keys and shapes."""
    from transformers import CLIPModel

    state = convert_state(load_state(path), path)
    return load_strictly(CLIPModel, None, config=infer_config(state), state_dict=state)


class HPS(ImageReward):
    """cos(image, own prompt), the prompt cleaned as by open_clip; loss 1 − score.

    Args:
        version: v2.0 or v2.1.
        model: hub id, file or folder of the weights.
        tokenizer: CLIP's, as hub id or folder.
        hps_resize: ``pad`` keeps the aspect ratio (longest side to the model's size, bicubic, centred on black: the
            official transform); ``squash`` stretches with bilinear interpolation, as the VADER reference did.
    """

    info = RewardInfo(
        name="hps",
        summary="CLIP ViT-H fine-tuned on human image rankings",
        range="-1 to 1, good images 0.25 to 0.35",
        paper="Wu et al. 2023, arXiv:2306.09341",
        weights={
            "model": Weight(
                source="xswu/HPSv2",
                kind="file",
                file=FILES[DEFAULT_VERSION],
                size=3_944_000_000,
                licence="Apache-2.0",
            ),
            "tokenizer": TOKENIZER,
        },
    )

    def __init__(
        self,
        *,
        version: Literal["v2.0", "v2.1"] = DEFAULT_VERSION,
        model: str = "xswu/HPSv2",
        tokenizer: str = TOKENIZER.source,
        hps_resize: Literal["pad", "squash"] = "pad",
    ):
        super().__init__()
        weights = self.required_weights({"version": version, "model": model, "tokenizer": tokenizer})
        clip = load_open_clip_file(locate(weights["model"]))
        words = load_tokenizer(locate(weights["tokenizer"]))
        side = clip.config.vision_config.image_size
        interpolation: Interpolation = "bicubic" if hps_resize == "pad" else "bilinear"
        transform = ImageTransform(
            height=side, width=side, fit=hps_resize, interpolation=interpolation, as_hpsv2=True
        )
        self.image = ImageTower(clip.vision_model, clip.visual_projection, transform)
        self.text = TextTower(clip.text_model, clip.text_projection, words, clean=clean_text)

    @classmethod
    def required_weights(cls, args: Mapping[str, Any]) -> dict[str, Weight]:
        required = super().required_weights(args)
        file = FILES[args.get("version", DEFAULT_VERSION)]
        return required | {"model": required["model"].named(file)}

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (self.image(images) * self.text(prompts)).sum(dim=-1)

    def loss(self, score: Tensor) -> Tensor:
        return 1 - score
