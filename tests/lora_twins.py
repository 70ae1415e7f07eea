"""Tiny denoisers of diffusers' real classes with random weights, their inputs, and adapters on them."""

import diffusers
import torch
from reward_twins import randomize
from torch import Tensor, nn

from Core.modules import lora, lora_names

TOKENS = dict(hidden_states=(1, 4, 8), encoder_hidden_states=(1, 5, 16))


def wan(**options) -> nn.Module:
    sizes = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16)
    sizes |= dict(freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32)
    return diffusers.WanTransformer3DModel(**sizes | options)


def wan_image() -> nn.Module:
    return wan(image_dim=8, added_kv_proj_dim=24)


def ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=16,
    )  # fmt: skip


def cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=5,
    )  # fmt: skip


def hunyuan_video15() -> nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def modelscope() -> nn.Module:
    return diffusers.UNet3DConditionModel(
        block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=16, attention_head_dim=4,
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip


VIDEO = dict(hidden_states=(1, 4, 2, 4, 4), encoder_hidden_states=(1, 5, 16))
HUNYUAN = VIDEO | dict(encoder_hidden_states_2=(1, 3, 8), image_embeds=(1, 2, 8))
# Name → denoiser, shapes of its inputs, other inputs.
TWINS = {
    "wan": (wan, VIDEO, {}),
    "wan_image": (wan_image, VIDEO | dict(encoder_hidden_states_image=(1, 3, 8)), {}),
    "ltx": (ltx, TOKENS, dict(num_frames=1, height=2, width=2, encoder_attention_mask=torch.ones(1, 5))),
    "cogvideox": (cogvideox, VIDEO | dict(hidden_states=(1, 2, 4, 8, 8)), {}),
    "hunyuan_video15": (
        hunyuan_video15,
        HUNYUAN,
        dict(
            encoder_attention_mask=torch.ones(1, 5).bool(), encoder_attention_mask_2=torch.ones(1, 3).bool()
        ),
    ),
    "modelscope": (modelscope, dict(sample=(1, 4, 2, 8, 8), encoder_hidden_states=(1, 5, 16)), {}),
}
ORIGINAL_NAMES = {"wan": lora_names.WAN, "wan_image": lora_names.WAN, "ltx": lora_names.LTX}


def denoiser(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(TWINS[name][0](), 0).requires_grad_(False)


@torch.no_grad()
def output(name: str, model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    _, shapes, others = TWINS[name]
    inputs = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return model(**inputs, **others, timestep=torch.tensor([500.0]), return_dict=False)[0]


def adapted_layers(model: nn.Module) -> list[str]:
    """The names of all layers an adapter can be attached to."""
    return [name for name, module in model.named_modules() if isinstance(module, lora.ADAPTED)]


def adapted(name: str, targets: list[str] | None = None, **options):
    """A denoiser and an adapter on it whose layers differ in rank and alpha, with a visible effect.

    Args:
        targets: by default every linear layer of the blocks.
    """
    model = denoiser(name)
    blocks = [layer for layer in adapted_layers(model) if "blocks." in layer]
    targets = targets or [layer for layer in blocks if isinstance(model.get_submodule(layer), nn.Linear)]
    ranks = {layer: 3 for layer in targets[::3]}
    alphas = {layer: 5 for layer in targets[::4]}
    model = lora.attach(model, targets, rank=2, alpha=4, ranks=ranks, alphas=alphas, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.parameters(model).values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model
