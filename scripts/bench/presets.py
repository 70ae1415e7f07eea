"""Benchmark presets: the released sizes, and a twin for CPUs.

The twin has one of XL/2's 28 layers (a spatial and a temporal block) at 240p, one of T5-XXL's 24 and one of ViT-H's 32,
and a VAE with about a fifth of the width and a fiftieth of the operations. Videos have 17 frames and take 10 sampling
steps. Depth is reduced rather than width: layers are alike, while the width sets the cost of matrix products relative
to elementwise operations.

Wan's sizes are those in ``Core.estimate.published``. Its presets take four sampling steps: the
others before the gradient window cost the same each.
"""

from dataclasses import dataclass, field
from typing import Any

from Core.estimate.published import settings_of
from Core.utils.options import parse_literal

XL2 = dict(type="benchmark-stdit3", depth=28, hidden_size=1152, num_heads=16, caption_channels=4096)
T5_XXL = dict(
    type="benchmark-t5", d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128
)
VIT_H = dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    projection_dim=1024,
)
VIT_H_TEXT = dict(
    vocab_size=49408,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    projection_dim=1024,
    hidden_act="gelu",
)
VAE = dict(type="benchmark-vae", vae_2d=None, vae_temporal={}, micro_frame_size=17, micro_batch_size=4)

TWIN = dict(XL2, depth=1)
TWIN_T5 = dict(T5_XXL, num_layers=1, vocab_size=32128 // 24)  # also one layer's share of the word embeddings
TWIN_VIT = dict(VIT_H, num_hidden_layers=1)
TWIN_VAE = dict(
    type="benchmark-vae",
    vae_2d=dict(
        block_out_channels=(24, 48, 88, 88),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=0.18215,
    ),
    vae_temporal=dict(filters=24, num_groups=8, num_res_blocks=1),
    micro_frame_size=17,
    micro_batch_size=4,
)
WAN_TWIN = dict(num_attention_heads=2, attention_head_dim=16, ffn_dim=32, num_layers=2, text_dim=16)
WAN_TWIN_VAE = dict(base_dim=4, z_dim=16, num_res_blocks=1)

TEXT_LENGTH = dict(model_max_length=300)
SCHEDULER = dict(type="rflow", use_timestep_transform=True, num_sampling_steps=30, cfg_scale=7.0)
ANY_FAMILY: dict[str, Any] = dict(
    prompt=["a red fox runs through snow", "a blue bird sits on a branch"],
    reward_fn="sharpness",  # placeholder: the benchmark builds its own scorer from the preset
    gradient_accumulation_steps=1,
    verbose=0,
)
COMMON: dict[str, Any] = dict(
    ANY_FAMILY,
    backbone="benchmark",
    aspect_ratio="3:4",
    num_frames="2s",
    scheduler=SCHEDULER,
    lora_rank=16,
)
# As in configs/wan/t2v_1_3b.py.
WAN_COMMON: dict[str, Any] = dict(
    ANY_FAMILY,
    backbone="benchmark-wan",
    resolution="480p",
    aspect_ratio="9:16",
    num_frames="5s",
    fps=16,
    schedule="unipc",
    num_sampling_steps=4,
    guidance_scale=5.0,
    negative_prompt="blurred, static",
    decode_context="causal",
    activation_offloading=True,
    lora_rank=32,
    lora_alpha=32,
)


@dataclass(frozen=True)
class Preset:
    """Config keys, and the sizes of the scorer's two towers; the twins have none for text."""

    values: dict[str, Any]
    vit: dict[str, int] = field(default_factory=VIT_H.copy)
    vit_text: dict[str, Any] | None = None


def _full_size(resolution: str) -> Preset:
    entries = dict(model=XL2, vae=VAE, text_encoder={**T5_XXL, **TEXT_LENGTH})
    return Preset({**COMMON, **entries, "resolution": resolution}, vit_text=VIT_H_TEXT)


def _published_wan(source: str, index: dict, **changes: Any) -> Preset:
    transformer, vae = (settings_of(source, component) for component in ("transformer", "vae"))
    return _wan(transformer, {"z_dim": 16, **vae}, index, **changes)


def _wan(transformer: dict, vae: dict, index: dict, vit: dict = VIT_H, **changes: Any) -> Preset:
    components = {
        "index": {"_class_name": "WanPipeline", **index},
        "transformer": {"in_channels": 16, **transformer},
        "vae": vae,
        "scheduler": {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0},
    }
    text = VIT_H_TEXT if vit is VIT_H else None
    return Preset({**WAN_COMMON, "components": components, **changes}, vit, text)


PRESETS = {
    "xl2-240p": _full_size("240p"),
    "xl2-360p": _full_size("360p"),
    "xl2-720p": _full_size("720p"),
    "cpu-twin": Preset(
        {
            **COMMON,
            "resolution": "240p",
            "num_frames": 17,
            "scheduler": {**SCHEDULER, "num_sampling_steps": 10},
            "model": TWIN,
            "vae": TWIN_VAE,
            "text_encoder": {**TWIN_T5, **TEXT_LENGTH},
        },
        TWIN_VIT,
    ),
    "wan-1.3b-480p": _published_wan("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", {}),
    "wan-ti2v-5b-480p": _published_wan(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers", {"expand_timesteps": True}, fps=24, shift=5.0
    ),
    "wan-twin": _wan(WAN_TWIN, WAN_TWIN_VAE, {}, TWIN_VIT, image_size=(32, 32), num_frames=5),
}
# Config keys that `plain` changes; plain.py does the rest.
PLAIN_VALUES = dict(dtype="fp32", mixed_precision="no")


@dataclass(frozen=True)
class Setting:
    """How to run a preset: ``default`` or ``plain``, then ``;key=value`` for each key to change."""

    plain: bool
    overrides: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Setting":
        name, *changes = [part.strip() for part in text.split(";")]
        if name not in ("default", "plain") or not all("=" in change for change in changes):
            raise ValueError(
                f"a setting is default or plain, and then ;key=value for each key to change, such as "
                f"'default;dtype=fp32', got {text!r}"
            )
        pairs = [change.partition("=") for change in changes]
        return cls(name == "plain", {key: parse_literal(value) for key, _, value in pairs})

    def values(self, preset: Preset) -> dict[str, Any]:
        """Config keys; ``scheduler.num_sampling_steps`` sets a nested key.

        Raises:
            ValueError: a nested key names an entry that does not exist.
        """
        values = {**preset.values, **(PLAIN_VALUES if self.plain else {})}
        for key, value in self.overrides.items():
            entry, _, inner = key.partition(".")
            if inner and not isinstance(values.get(entry), dict):
                raise ValueError(f"{key}: the preset has no entry {entry!r} that holds keys")
            values[entry] = {**values[entry], inner: value} if inner else value
        return values
