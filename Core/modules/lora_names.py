"""The names of a network's layers in its first release, which ComfyUI and kohya's trainers kept, beside diffusers'.

A table maps each layer's name in diffusers to its original one, ``{}`` standing for a block's number. It holds the
layers that adapters are trained on, and the norms and modulations whose changes some files hold beside them. A model
family sets ``original_names`` to its table; what is not known for certain has none, and its adapters are not written in
those formats.
"""

import re
from collections.abc import Mapping

# Wan 2.1 and 2.2; `wan/modules/model.py` of the release. The last seven rows are of image-to-video models. Its norm2
# and norm3 are diffusers' norm3 and norm2, and `modulation` is no layer but a tensor.
WAN = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "blocks.{}.attn1.to_q": "blocks.{}.self_attn.q",
    "blocks.{}.attn1.to_k": "blocks.{}.self_attn.k",
    "blocks.{}.attn1.to_v": "blocks.{}.self_attn.v",
    "blocks.{}.attn1.to_out.0": "blocks.{}.self_attn.o",
    "blocks.{}.attn2.to_q": "blocks.{}.cross_attn.q",
    "blocks.{}.attn2.to_k": "blocks.{}.cross_attn.k",
    "blocks.{}.attn2.to_v": "blocks.{}.cross_attn.v",
    "blocks.{}.attn2.to_out.0": "blocks.{}.cross_attn.o",
    "blocks.{}.ffn.net.0.proj": "blocks.{}.ffn.0",
    "blocks.{}.ffn.net.2": "blocks.{}.ffn.2",
    "proj_out": "head.head",
    "blocks.{}.norm2": "blocks.{}.norm3",
    "blocks.{}.norm3": "blocks.{}.norm2",
    "blocks.{}.attn1.norm_q": "blocks.{}.self_attn.norm_q",
    "blocks.{}.attn1.norm_k": "blocks.{}.self_attn.norm_k",
    "blocks.{}.attn2.norm_q": "blocks.{}.cross_attn.norm_q",
    "blocks.{}.attn2.norm_k": "blocks.{}.cross_attn.norm_k",
    "blocks.{}.scale_shift_table": "blocks.{}.modulation",
    "scale_shift_table": "head.modulation",
    "blocks.{}.attn2.norm_added_k": "blocks.{}.cross_attn.norm_k_img",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "blocks.{}.attn2.add_k_proj": "blocks.{}.cross_attn.k_img",
    "blocks.{}.attn2.add_v_proj": "blocks.{}.cross_attn.v_img",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
}

# LTX-Video 0.9; the transformer keeps its release's names but for the embedders of latent and time, and some norms.
LTX = {
    "proj_in": "patchify_proj",
    "time_embed.emb.timestep_embedder.linear_1": "adaln_single.emb.timestep_embedder.linear_1",
    "time_embed.emb.timestep_embedder.linear_2": "adaln_single.emb.timestep_embedder.linear_2",
    "time_embed.linear": "adaln_single.linear",
    "caption_projection.linear_1": "caption_projection.linear_1",
    "caption_projection.linear_2": "caption_projection.linear_2",
    "transformer_blocks.{}.attn1.to_q": "transformer_blocks.{}.attn1.to_q",
    "transformer_blocks.{}.attn1.to_k": "transformer_blocks.{}.attn1.to_k",
    "transformer_blocks.{}.attn1.to_v": "transformer_blocks.{}.attn1.to_v",
    "transformer_blocks.{}.attn1.to_out.0": "transformer_blocks.{}.attn1.to_out.0",
    "transformer_blocks.{}.attn2.to_q": "transformer_blocks.{}.attn2.to_q",
    "transformer_blocks.{}.attn2.to_k": "transformer_blocks.{}.attn2.to_k",
    "transformer_blocks.{}.attn2.to_v": "transformer_blocks.{}.attn2.to_v",
    "transformer_blocks.{}.attn2.to_out.0": "transformer_blocks.{}.attn2.to_out.0",
    "transformer_blocks.{}.ff.net.0.proj": "transformer_blocks.{}.ff.net.0.proj",
    "transformer_blocks.{}.ff.net.2": "transformer_blocks.{}.ff.net.2",
    "proj_out": "proj_out",
    "transformer_blocks.{}.attn1.norm_q": "transformer_blocks.{}.attn1.q_norm",
    "transformer_blocks.{}.attn1.norm_k": "transformer_blocks.{}.attn1.k_norm",
    "transformer_blocks.{}.attn2.norm_q": "transformer_blocks.{}.attn2.q_norm",
    "transformer_blocks.{}.attn2.norm_k": "transformer_blocks.{}.attn2.k_norm",
    "transformer_blocks.{}.scale_shift_table": "transformer_blocks.{}.scale_shift_table",
    "scale_shift_table": "scale_shift_table",
}


def to_original(module: str, names: Mapping[str, str]) -> str:
    """The original name of a layer that diffusers calls ``module``.

    Raises:
        ValueError: the table ``names`` has no such layer.
    """
    if (found := _translate(module, names)) is None:
        raise ValueError(f"no original name is known of the layer {module!r}, which these formats go by")
    return found


def from_original(module: str, names: Mapping[str, str]) -> str:
    """diffusers' name of a layer; one that is no original name of the table is taken for diffusers' own."""
    return _translate(module, {original: ours for ours, original in names.items()}) or module


def from_flat(module: str, names: Mapping[str, str]) -> str:
    """The same from an original name whose dots became underscores, as kohya writes it.

    Raises:
        ValueError: the table ``names`` has no such layer.
    """
    flat = {original.replace(".", "_"): ours for ours, original in names.items()}
    if (found := _translate(module, flat)) is None:
        raise ValueError(f"names a layer {module!r}, which the model family does not have")
    return found


def _translate(module: str, names: Mapping[str, str]) -> str | None:
    """``module`` by a table of templates, or None where none of them fits it."""
    for template, other in names.items():
        if match := re.fullmatch(re.escape(template).replace(r"\{\}", r"(\d+)"), module):
            return other.format(*match.groups())
    return None
