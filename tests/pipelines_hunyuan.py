"""A tiny HunyuanVideo 1.5 of the real classes, with random weights, saved as it is published."""

from pathlib import Path
from typing import Any

from pipelines import CAPTIONS, randomise
from torch import nn

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUOTING = 'a sign that says "OPEN" and “no”'


def qwen_tokenizer() -> Any:
    """Byte-level BPE that knows the system message, so that captions come after the tokens the pipeline leaves out."""
    import inspect

    from diffusers import HunyuanVideo15Pipeline
    from transformers import Qwen2Tokenizer

    signature = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds)
    system = signature.parameters["system_message"].default
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator([system, *CAPTIONS, QUOTING] * 4, 700)
    tokenizer.add_special_tokens({"additional_special_tokens": special, "pad_token": special[-1]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text_encoders(vocabulary: int) -> dict[str, nn.Module]:
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

    qwen = Qwen2_5_VLTextConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=0,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
    )
    byt5 = T5Config(vocab_size=384, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    return {
        "text_encoder": randomise(Qwen2_5_VLTextModel(qwen), 3),
        "text_encoder_2": randomise(T5EncoderModel(byt5), 4),
    }


def transformer(**changes: Any) -> nn.Module:
    from diffusers import HunyuanVideo15Transformer3DModel

    sizes = {
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": 16,
        "text_embed_2_dim": 12,
        "image_embed_dim": 6,
        "rope_axes_dim": (2, 2, 4),
        "task_type": "t2v",
    }
    network = randomise(HunyuanVideo15Transformer3DModel(**{**sizes, **changes}), 1)
    network.proj_out.weight.data *= 4  # a prediction large enough for an adapter to move the video
    return network


def vae(**changes: Any) -> nn.Module:
    from diffusers import AutoencoderKLHunyuanVideo15

    sizes = {"latent_channels": 4, "block_out_channels": (4, 8, 8), "layers_per_block": 1}
    sizes["spatial_compression_ratio"] = 4
    network = randomise(AutoencoderKLHunyuanVideo15(**{**sizes, **changes}), 2, 0.1)
    network.decoder.conv_out.conv.weight.data *= 0.3  # pixels within their range
    return network


def save_hunyuan(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideo15Pipeline
    from diffusers.guiders import ClassifierFreeGuidance
    from transformers import ByT5Tokenizer

    tokenizer = qwen_tokenizer()
    HunyuanVideo15Pipeline(
        tokenizer=tokenizer,
        **text_encoders(len(tokenizer)),
        tokenizer_2=ByT5Tokenizer(),
        transformer=transformer(),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    ).save_pretrained(folder)
    return folder
