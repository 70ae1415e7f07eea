"""Tiny random-weight twins of the scorers' networks, saved in the layout of the published ones.

Each differs from its model in sizes only. Every builder is deterministic and returns the folder it was given.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from torch import nn
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    T5Tokenizer,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessorPil,
    ViTConfig,
    ViTModel,
    VJEPA2Config,
    VJEPA2Model,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

SIZE = 16  # pixels a twin's vision tower takes
WORDS = {"positive": "sharp photo of", "negative": "blurry drawing of"}
QWEN2_VL = Path(__file__).parent / "golden" / "rewards"  # twins of the scorers built on it
LETTERS = "abcdefghijklmnopqrstuvwxyz,.'0123456789"


def randomize(model: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Random weights of a size at which every layer matters; norms keep their scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / fan_in**0.5)
            elif parameter.dim() == 1:
                # A norm's ones and a bias's zeros are kept; what the class draws itself (CLIP's class token) is not.
                constant = parameter[0] if (parameter == parameter[0]).all() else 0.0
                parameter.copy_(constant + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP tokenizer of single letters, a letter ending a word being a token of its own."""
    tokens = [letter + end for letter, end in itertools.product(LETTERS, ("", "</w>"))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=24)


def clip_folder(folder: Path, seed: int = 0) -> Path:
    """CLIP: 16×16 pixels, patches of 8, projection to 12, text of at most 24 tokens."""
    tokenizer = clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        projection_dim=12,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    randomize(CLIPModel(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": SIZE}
    CLIPImageProcessorPil(size=size, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def head_file(path: Path, widths: tuple[int, ...], indices: tuple[int, ...], seed: int = 0) -> Path:
    """A head `layers.<i>` of the given widths, saved as the published ones are (a pickled state dict)."""
    state = {}
    generator = torch.Generator().manual_seed(seed)
    for i, (width_in, width_out) in zip(indices, itertools.pairwise(widths), strict=True):
        state[f"layers.{i}.weight"] = torch.randn(width_out, width_in, generator=generator) / width_in**0.5
        state[f"layers.{i}.bias"] = torch.randn(width_out, generator=generator) * 0.1
    torch.save(state, path)
    return path


def renamed_head(path: Path, name: str, head: Path) -> Path:
    """A copy of a head file whose chain of layers has another name."""
    state = torch.load(head, weights_only=True)
    torch.save({key.replace("layers", name): value for key, value in state.items()}, path)
    return path


def siglip_folder(folder: Path) -> Path:
    """SigLIP: 16×16 pixels, patches of 8, a sentencepiece tokenizer, texts padded to 12 tokens."""
    tokenizer = T5Tokenizer().train_new_from_iterator(["a red fox runs", "blue dog sits", "green bird"], 60)
    tokenizer.model_max_length = 12
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 12, "projection_size": 16}
    vision = {**sizes, "image_size": SIZE, "patch_size": 8}
    randomize(SiglipModel(SiglipConfig(text_config=text, vision_config=vision))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def videomae_folder(folder: Path) -> Path:
    """VideoMAE classifier: 4 frames of 16×16, five actions."""
    actions = ["riding a bike", "playing guitar", "bike", "swimming", "riding a horse"]
    config = VideoMAEConfig(
        image_size=SIZE,
        patch_size=8,
        num_frames=4,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        id2label=dict(enumerate(actions)),
        label2id={label: i for i, label in enumerate(actions)},
        use_mean_pooling=True,
    )
    randomize(VideoMAEForVideoClassification(config)).save_pretrained(folder)
    size = {"shortest_edge": SIZE}
    VideoMAEImageProcessorPil(size=size, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def yolos_folder(folder: Path) -> Path:
    """YOLOS: short side 32, patches of 16, five boxes, three classes."""
    config = YolosConfig(
        image_size=[32, 48],
        patch_size=16,
        num_detection_tokens=5,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        id2label={0: "cat", 1: "dog", 2: "car"},
        label2id={"cat": 0, "dog": 1, "car": 2},
    )
    randomize(YolosForObjectDetection(config)).save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 48}).save_pretrained(folder)
    return folder


def vjepa_folder(folder: Path) -> Path:
    """V-JEPA 2: 16×16 pixels, patches of 4, tubelets of 2 frames."""
    config = VJEPA2Config(
        crop_size=SIZE,
        patch_size=4,
        frames_per_clip=8,
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        mlp_ratio=2.0,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        pred_mlp_ratio=2.0,
        pred_num_mask_tokens=2,
        num_pooler_layers=1,
    )
    randomize(VJEPA2Model(config)).save_pretrained(folder)
    values = {"size": {"shortest_edge": int(SIZE * 256 / 224)}, "crop_size": {"height": SIZE, "width": SIZE}}
    values |= {"resample": 2, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def dino_folder(folder: Path) -> Path:
    """DINO's ViT: 16×16 pixels, patches of 4."""
    config = ViTConfig(
        image_size=SIZE,
        patch_size=4,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    randomize(ViTModel(config, add_pooling_layer=False)).save_pretrained(folder)
    return folder


def blip_state(width: int = 64, text_width: int = 16, vocabulary: int = 50) -> dict[str, torch.Tensor]:
    """ImageReward's state dict in BLIP's names: 16×16 pixels, patches of 8, two blocks each, a linear head."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def linear(name: str, width_in: int, width_out: int) -> dict[str, torch.Tensor]:
        weight = tensor(width_out, width_in, scale=width_in**-0.5)
        return {f"{name}.weight": weight, f"{name}.bias": tensor(width_out, scale=0.1)}

    def norm(name: str, size: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + tensor(size, scale=0.1), f"{name}.bias": tensor(size, scale=0.1)}

    def attention(name: str, seen: int) -> dict[str, torch.Tensor]:
        state = linear(f"{name}.self.query", text_width, text_width)
        state |= linear(f"{name}.self.key", seen, text_width) | linear(f"{name}.self.value", seen, text_width)
        return (
            state
            | linear(f"{name}.output.dense", text_width, text_width)
            | norm(f"{name}.output.LayerNorm", text_width)
        )

    image, text = "blip.visual_encoder", "blip.text_encoder"
    state = {
        f"{image}.cls_token": tensor(1, 1, width),
        f"{image}.pos_embed": tensor(1, 5, width),
        f"{image}.patch_embed.proj.weight": tensor(width, 3, 8, 8, scale=192**-0.5),
        f"{image}.patch_embed.proj.bias": tensor(width, scale=0.1),
        **norm(f"{image}.norm", width),
        f"{text}.embeddings.position_ids": torch.arange(40)[None],
        f"{text}.embeddings.word_embeddings.weight": tensor(vocabulary, text_width),
        f"{text}.embeddings.position_embeddings.weight": tensor(40, text_width),
        **norm(f"{text}.embeddings.LayerNorm", text_width),
        **linear("blip.vision_proj", width, 8),
        **linear("blip.text_proj", text_width, 8),
    }
    for i in range(2):
        block, layer = f"{image}.blocks.{i}", f"{text}.encoder.layer.{i}"
        state |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        state |= linear(f"{block}.attn.qkv", width, 3 * width) | linear(f"{block}.attn.proj", width, width)
        state |= linear(f"{block}.mlp.fc1", width, 2 * width) | linear(f"{block}.mlp.fc2", 2 * width, width)
        state |= attention(f"{layer}.attention", text_width) | attention(f"{layer}.crossattention", width)
        state |= linear(f"{layer}.intermediate.dense", text_width, 32)
        state |= linear(f"{layer}.output.dense", 32, text_width) | norm(
            f"{layer}.output.LayerNorm", text_width
        )
    for i, (wide, narrow) in zip((0, 2, 4, 6, 7), itertools.pairwise((16, 12, 8, 6, 5, 1)), strict=True):
        state |= linear(f"mlp.layers.{i}", wide, narrow)
    return state


def image_reward_folder(folder: Path) -> Path:
    """ImageReward in the published layout, with BERT's tokenizer of single letters beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [prefix + letter for letter in LETTERS[:26] for prefix in ("", "##")]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(folder)
    torch.save(blip_state(vocabulary=len(tokens) + 2), folder / "ImageReward.pt")
    sizes = {"vocab_size": len(tokens) + 2, "hidden_size": 16, "intermediate_size": 32, "encoder_width": 999}
    layers = {"num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 40}
    others = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0}
    (folder / "med_config.json").write_text(json.dumps(sizes | layers | others), encoding="utf-8")
    return folder


def open_clip_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """State dict in open_clip's layout: widths 80 and 64 (one head each), two blocks, projection to 12."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def norm(name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + tensor(width, scale=0.1), f"{name}.bias": tensor(width, scale=0.1)}

    def linear(name: str, width_in: int, width_out: int, stem: str = ".") -> dict[str, torch.Tensor]:
        weight = tensor(width_out, width_in, scale=width_in**-0.5)
        return {f"{name}{stem}weight": weight, f"{name}{stem}bias": tensor(width_out, scale=0.1)}

    def blocks(prefix: str, width: int) -> dict[str, torch.Tensor]:
        state = {}
        for i in range(2):
            name = f"{prefix}transformer.resblocks.{i}"
            state |= norm(f"{name}.ln_1", width) | norm(f"{name}.ln_2", width)
            state |= linear(f"{name}.attn.in_proj", width, 3 * width, stem="_")
            state |= linear(f"{name}.attn.out_proj", width, width)
            state |= linear(f"{name}.mlp.c_fc", width, 2 * width) | linear(
                f"{name}.mlp.c_proj", 2 * width, width
            )
        return state

    vocabulary = len(clip_tokenizer())
    return {
        "visual.class_embedding": tensor(80),
        "visual.positional_embedding": tensor(5, 80),
        "visual.proj": tensor(80, 12, scale=80**-0.5),
        "visual.conv1.weight": tensor(80, 3, 8, 8, scale=192**-0.5),
        **norm("visual.ln_pre", 80),
        **norm("visual.ln_post", 80),
        **blocks("visual.", 80),
        "positional_embedding": tensor(24, 64),
        "token_embedding.weight": tensor(vocabulary, 64),
        **norm("ln_final", 64),
        **blocks("", 64),
        "text_projection": tensor(64, 12, scale=64**-0.5),
        "logit_scale": torch.tensor(2.6592),
    }


def qwen2_vl_arguments(name: str, **others) -> dict:
    """`reward_args` of `videoalign` or `hpsv3` that load the twin in the repository and allow small pictures."""
    folder = QWEN2_VL / name
    model = folder if name == "videoalign" else folder / "HPSv3.safetensors"
    named = {"model": str(model), "base": str(QWEN2_VL / "base"), "template": str(folder / "template.txt")}
    return named | {"min_pixels": 3136} | others


def twin_arguments(root: Path) -> dict[str, dict]:
    """Build every twin under `root`; registered name → `reward_args` that load it."""
    clip = str(clip_folder(root / "clip"))
    laion = str(head_file(root / "laion.pth", (12, 8, 6, 5, 4, 1), (0, 2, 4, 6, 7)))
    linear = head_file(root / "linear.pth", (16, 8, 6, 5, 4, 1), (0, 2, 4, 6, 8))
    scoring = str(renamed_head(root / "scoring.pth", "scoring_head", linear))
    blip = str(image_reward_folder(root / "image_reward"))
    jpeg = str(head_file(root / "jpeg.pt", (12, 8, 6, 5, 1), (0, 3, 6, 9)))
    torch.save({"state_dict": open_clip_state()}, root / "HPS_v2.1_compressed.pt")
    aesthetic = {"model": clip, "head": laion}
    hps = {"model": str(root), "tokenizer": clip}
    return {
        "aesthetic": aesthetic,
        "aesthetic_v2_5": {"model": str(siglip_folder(root / "siglip")), "head": scoring},
        "hps": hps,
        "aesthetic_hps": {"aesthetic": aesthetic, "hps": hps},
        "pick_score": {"model": clip},
        "image_reward": {"model": blip, "tokenizer": blip},
        "clip_score": {"model": clip},
        "actpred": {"model": str(videomae_folder(root / "videomae"))},
        "compression": {"model": clip, "head": jpeg},
        "incompressibility": {"model": clip, "head": jpeg},
        "rainy": {"model": clip, "head": laion},
        "snowy": {"model": clip, "head": laion},
        "weather": {"model": clip, "head": laion},
        "object_detection": {"model": str(yolos_folder(root / "yolos")), "label": "dog"},
        "vjepa": {"model": str(vjepa_folder(root / "vjepa"))},
        "videoalign": qwen2_vl_arguments("videoalign", slice_size=32),
        "hpsv3": qwen2_vl_arguments("hpsv3", min_pixels=784, max_pixels=784, slice_size=32),
        "motion": {},
        "command": {"command": "true"},
        "sharpness": {},
        "saturation": {},
        "subject_consistency": {"model": str(dino_folder(root / "dino"))},
        "background_consistency": {"model": clip},
        "temporal_flickering": {},
        "motion_smoothness": {},
        "dynamic_degree": {},
        "relative": {"reward": "pick_score", "reward_args": {"model": clip}, **WORDS},
        "hinge": {"reward": "clip_score", "reward_args": {"model": clip}, "target": 1000.0},
    }


def smooth_images(count: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """8-bit pictures [N, 3, H, W] made of a few waves, with detail a resize keeps, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.linspace(0, 1, side) for side in size)
    images = torch.zeros(count, 3, *size)
    for _ in range(4):
        kx, ky, phase, height = torch.rand(4, count, 3, 1, 1, generator=generator)
        images += height * torch.sin(6 * kx * columns + 6 * ky * rows[:, None] + 6.3 * phase)
    images = images / 4 + 0.5
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
