"""Full-size layouts of the published checkpoints, on the meta device: every key has a place, none is left over.

HPSv2's keys are open_clip's own (`golden/open_clip_vit_h14.json`); those of the others are written out here from
the published files, blocks by pattern.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from reward_twins import open_clip_state
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VJEPA2Config,
    VJEPA2Model,
    YolosConfig,
    YolosForObjectDetection,
)

from Core.rewards import resolve_reward
from Core.rewards.clip import TEXT_HALF
from Core.rewards.hps import convert_state, infer_config, load_open_clip_file
from Core.utils.state_dict import load_strictly

GOLDEN = Path(__file__).parent / "golden"
Shapes = dict[str, tuple[int, ...]]


def affine(name: str, *shape: int) -> Shapes:
    """Weight of the given shape and a bias as long as its first side."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def blocks(prefix: str, count: int, block: Shapes) -> Shapes:
    return {f"{prefix}.{i}.{key}": shape for i in range(count) for key, shape in block.items()}


def clip_block(width: int) -> Shapes:
    shapes = affine("layer_norm1", width) | affine("layer_norm2", width)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= affine(f"self_attn.{name}", width, width)
    return shapes | affine("mlp.fc1", 4 * width, width) | affine("mlp.fc2", width, 4 * width)


def clip_keys(vision: int, vision_layers: int, text: int, text_layers: int, projection: int) -> Shapes:
    """openai/clip-vit-large-patch14 and yuvalkirstain/PickScore_v1: patch 14, 224 pixels, 77 tokens."""
    return {
        "logit_scale": (),
        "vision_model.embeddings.class_embedding": (vision,),
        "vision_model.embeddings.patch_embedding.weight": (vision, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, vision),
        "vision_model.embeddings.position_ids": (1, 257),
        **affine("vision_model.pre_layrnorm", vision),
        **affine("vision_model.post_layernorm", vision),
        **blocks("vision_model.encoder.layers", vision_layers, clip_block(vision)),
        "visual_projection.weight": (projection, vision),
        "text_model.embeddings.token_embedding.weight": (49408, text),
        "text_model.embeddings.position_embedding.weight": (77, text),
        "text_model.embeddings.position_ids": (1, 77),
        **affine("text_model.final_layer_norm", text),
        **blocks("text_model.encoder.layers", text_layers, clip_block(text)),
        "text_projection.weight": (projection, text),
    }


def vit_block(width: int, projections: Shapes) -> Shapes:
    shapes = affine("layernorm_before", width) | affine("layernorm_after", width)
    shapes |= {f"attention.attention.{key}": shape for key, shape in projections.items()}
    shapes |= affine("attention.output.dense", width, width)
    return shapes | affine("intermediate.dense", 4 * width, width) | affine("output.dense", width, 4 * width)


def videomae_keys(layers: int = 12) -> Shapes:
    """MCG-NJU/videomae-base-finetuned-kinetics: no bias on the keys, fixed positions."""
    projections: Shapes = {f"{name}.weight": (768, 768) for name in ("query", "key", "value")}
    projections |= {"q_bias": (768,), "v_bias": (768,)}
    return {
        **affine("videomae.embeddings.patch_embeddings.projection", 768, 3, 2, 16, 16),
        **blocks("videomae.encoder.layer", layers, vit_block(768, projections)),
        **affine("fc_norm", 768),
        **affine("classifier", 400, 768),
    }


def yolos_keys() -> Shapes:
    """hustvl/yolos-small: 512×864 pixels at pretraining, 100 boxes, 91 classes and "none"."""
    projections: Shapes = {}
    for name in ("query", "key", "value"):
        projections |= affine(name, 384, 384)
    keys: Shapes = {
        "vit.embeddings.cls_token": (1, 1, 384),
        "vit.embeddings.detection_tokens": (1, 100, 384),
        "vit.embeddings.position_embeddings": (1, 1829, 384),
        **affine("vit.embeddings.patch_embeddings.projection", 384, 3, 16, 16),
        **blocks("vit.encoder.layer", 12, vit_block(384, projections)),
        "vit.encoder.mid_position_embeddings": (11, 1, 1829, 384),
        **affine("vit.layernorm", 384),
    }
    for head, outputs in (("class_labels_classifier", 92), ("bbox_predictor", 4)):
        for i, rows in enumerate((384, 384, outputs)):
            keys |= affine(f"{head}.layers.{i}", rows, 384)
    return keys


def vjepa_block(width: int) -> Shapes:
    shapes = affine("norm1", width) | affine("norm2", width)
    for name in ("query", "key", "value", "proj"):
        shapes |= affine(f"attention.{name}", width, width)
    return shapes | affine("mlp.fc1", 4 * width, width) | affine("mlp.fc2", width, 4 * width)


def vjepa_keys() -> Shapes:
    """facebook/vjepa2-vitl-fpc64-256: ViT-L encoder, predictor of 12 blocks."""
    return {
        **affine("encoder.embeddings.patch_embeddings.proj", 1024, 3, 2, 16, 16),
        **blocks("encoder.layer", 24, vjepa_block(1024)),
        **affine("encoder.layernorm", 1024),
        "predictor.embeddings.mask_tokens": (10, 1, 1, 384),
        **affine("predictor.embeddings.predictor_embeddings", 384, 1024),
        **blocks("predictor.layer", 12, vjepa_block(384)),
        **affine("predictor.layernorm", 384),
        **affine("predictor.proj", 1024, 384),
    }


def clip_config(vision: int, vision_layers: int, text: int, text_layers: int, projection: int) -> CLIPConfig:
    def tower(width: int, layers: int, heads: int) -> dict:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return sizes | {"num_attention_heads": heads, "projection_dim": projection}

    return CLIPConfig(
        vision_config=tower(vision, vision_layers, 16) | {"patch_size": 14},
        text_config=tower(text, text_layers, text // 64),
        projection_dim=projection,
    )


VIT_L14, VIT_H14 = (1024, 24, 768, 12, 768), (1280, 32, 1024, 24, 1024)
YOLOS_SMALL = dict(hidden_size=384, intermediate_size=1536, num_attention_heads=6, image_size=[512, 864])
YOLOS_SMALL |= dict(use_mid_position_embeddings=True, num_labels=91)
PUBLISHED = {
    "clip_score": (CLIPModel, clip_config(*VIT_L14), clip_keys(*VIT_L14)),
    "pick_score": (CLIPModel, clip_config(*VIT_H14), clip_keys(*VIT_H14)),
    "actpred": (
        VideoMAEForVideoClassification,
        VideoMAEConfig(num_labels=400, use_mean_pooling=True),
        videomae_keys(),
    ),
    "object_detection": (YolosForObjectDetection, YolosConfig(**YOLOS_SMALL), yolos_keys()),
    "vjepa": (VJEPA2Model, VJEPA2Config(), vjepa_keys()),
}


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoint_fits_key_by_key(name):
    model_class, config, shapes = PUBLISHED[name]
    load_strictly(model_class, None, config=config, state_dict=on_meta(shapes), device_map="meta")
    size = 4 * sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith("position_ids"))
    assert resolve_reward(name).info.weights["model"].size == pytest.approx(size, rel=0.01)


def test_vision_half_takes_its_keys_from_a_whole_clip():
    config, state = clip_config(*VIT_L14).vision_config, on_meta(clip_keys(*VIT_L14))
    load_strictly(
        CLIPVisionModelWithProjection, None, TEXT_HALF, config=config, state_dict=state, device_map="meta"
    )


def test_checkpoint_that_does_not_fit_is_refused_with_the_keys():
    shapes = videomae_keys(layers=1)
    config = VideoMAEConfig(num_labels=400, use_mean_pooling=True, num_hidden_layers=1, image_size=32)
    del shapes["fc_norm.weight"]
    shapes |= {"decoder.weight": (3,), "classifier.bias": (7,)}
    with pytest.raises(
        ValueError,
        match=r"1 missing: fc_norm.weight; 1 unexpected: decoder.weight; 1 of another shape: "
        r"classifier.bias \(7,\) instead of \(400,\)",
    ):
        load_strictly(
            VideoMAEForVideoClassification, None, config=config, state_dict=on_meta(shapes), device_map="meta"
        )


def test_hpsv2_checkpoint_converts_key_by_key():
    manifest = json.loads((GOLDEN / "open_clip_vit_h14.json").read_text())
    assert len(manifest) == 686
    converted = convert_state(on_meta({key: tuple(shape) for key, shape in manifest.items()}), "the file")
    expected = {key: shape for key, shape in clip_keys(*VIT_H14).items() if not key.endswith("position_ids")}
    assert {key: tuple(value.shape) for key, value in converted.items()} == expected
    config = infer_config(converted)
    assert config.vision_config.image_size == 224 and config.vision_config.num_attention_heads == 16
    assert config.text_config.num_attention_heads == 16 and config.text_config.max_position_embeddings == 77
    load_strictly(CLIPModel, None, config=config, state_dict=converted, device_map="meta")


def renamed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The state as a wrapped model saves it; with ``text.``, as open_clip's model with a text tower of its own."""
    text = [key for key in state if not key.startswith("visual.") and key != "logit_scale"]
    own = "text." if prefix.endswith("text.") else ""
    outer = prefix.removesuffix("text.")
    return {outer + (own if key in text else "") + key: value for key, value in state.items()}


@pytest.mark.parametrize("prefix", ["module.", "text.", "module.text."])
def test_hps_takes_its_file_with_prefixes_and_buffers(prefix, tmp_path):
    state = open_clip_state()
    buffers = {"attn_mask": torch.zeros(24, 24), "visual.position_ids": torch.arange(5)}
    torch.save({"state_dict": renamed(state | buffers, prefix)}, tmp_path / "hps.pt")
    expected = convert_state(state, "the file")
    found = load_open_clip_file(tmp_path / "hps.pt").state_dict()
    assert set(expected) <= set(found)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("lost", "other", "message"),
    [
        ("", "visual.attnpool.k_proj.weight", "unknown keys visual.attnpool.k_proj.weight"),
        ("visual.proj", "", "it has no visual_projection.weight"),
        ("visual.transformer", "", "it has no vision_model.encoder.layers.0.mlp.fc1.weight"),
    ],
)
def test_a_file_of_another_layout_is_no_hps_and_is_named_by_its_path(lost, other, message, tmp_path):
    state = {key: value for key, value in open_clip_state().items() if not (lost and key.startswith(lost))}
    torch.save(state | ({other: torch.empty(1)} if other else {}), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"{tmp_path / 'other.pt'} is not an open_clip ViT CLIP: {message}"):
        load_open_clip_file(tmp_path / "other.pt")
