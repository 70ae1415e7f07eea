"""Stages ``clip`` and ``aesthetic``: the demo's reward models.

The CLIP's cosine is regressed to explicit targets instead of being contrasted, in two turns. The gentle one (all
right ≈ 1, one of colour and shape wrong ≈ 0.26, both wrong ≈ -0.07) teaches it to see both; the steep one (1, 0,
-0.2) spreads what it has learned, so that the distance between the base model's videos and true ones stays large.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from scripts.demo import text, vae, world
from scripts.demo.common import SEED, WORK, LossFn, fit, log, save, to_pixels

TEXT_TOKENS = 32
FEATURES = 96
TOWER = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    hidden_act="gelu",
    projection_dim=FEATURES,
)
TEXT_TOWER = {**TOWER, "hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2}
LOGIT_SCALE = math.log(100)  # PickScore's own unit: a perfect cosine scores 100
BACKGROUND = 0.05  # what a matching background adds to the cosine

NAMING = 0.2  # weight of the readers' cross entropy
POOL = 1280  # scenes whose decoded frames are kept
PIXEL_MEAN, PIXEL_STD = 0.5, 0.5


@dataclass(frozen=True)
class Targets:
    """Wanted cosines: ``none`` right, ``one`` of colour and shape, or ``both``."""

    none: float
    one: float
    both: float

    def cosines(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, M]`` wanted and how many are right, between rows ``[N, 3]``, ``[M, 3]`` (colour, shape, background)."""
        colour, shape, background = (a[:, None] == b[None]).unbind(-1)
        right = colour.long() + shape.long()
        wanted = torch.tensor([self.none, self.one, self.both])[right] + BACKGROUND * background
        return wanted, right


GENTLE = Targets(none=-0.12, one=0.21, both=0.95)
STEEP = Targets(none=-0.25, one=-0.02, both=0.95)


def attributes(scenes: list[world.Scene]) -> Tensor:
    """Indices of colour, shape and background, ``[N, 3]``."""
    rows = [
        (
            list(world.COLOURS).index(s.colour),
            world.SHAPES.index(s.shape),
            world.BACKGROUNDS.index(s.background),
        )
        for s in scenes
    ]
    return torch.tensor(rows)


@torch.no_grad()
def decoded_pool() -> Tensor:
    """Frames as the VAE shows them, ``uint8 [POOL, 4, 3, 64, 64]``: two of a whole clip, two latents decoded alone.

    The latents carry noise of up to 0.4 of their spread, as a denoiser leaves it. Row ``i`` is scene ``i``.
    """
    path = WORK / "decoded_pool.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    latents, _, _ = vae.normalised_latents()
    pipeline = vae.train_decoder()
    generator, parts = torch.Generator().manual_seed(SEED), []
    for start in range(0, POOL, 16):
        z = latents[start : start + 16]
        z = z + 0.4 * torch.rand(16, 1, 1, 1, 1, generator=generator) * torch.randn(
            z.shape, generator=generator
        )
        raw = z * pipeline.scale + pipeline.shift
        whole = pipeline.temporal_vae.decode(raw, num_frames=world.FRAMES)
        picks = torch.randint(world.FRAMES, (2,), generator=generator)
        alone = torch.randint(z.shape[2], (2,), generator=generator)
        frames = [whole[:, :, f] for f in picks]
        frames += [pipeline.temporal_vae.decode(raw[:, :, k : k + 1], num_frames=1)[:, :, 0] for k in alone]
        pixels = vae.decode_frames(pipeline.spatial_vae.module, torch.cat(frames)).unflatten(0, (4, 16))
        parts.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().transpose(0, 1))
        if (start + 16) % 256 == 0:
            log("clip", f"decoded {start + 16}/{POOL} scenes")
    save(torch.cat(parts), path)
    return torch.cat(parts)


def augment(images: Tensor) -> Tensor:
    """Shift, blur, contrast, brightness and noise on images ``[B, 3, 64, 64]`` in [-1, 1], each per image."""
    n = len(images)
    shifts = torch.randint(-3, 4, (2,)).tolist()
    images = nn.functional.pad(images, (3, 3, 3, 3), mode="replicate")
    images = images[:, :, 3 + shifts[0] : 67 + shifts[0], 3 + shifts[1] : 67 + shifts[1]]
    smooth = nn.functional.avg_pool2d(nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images.lerp(smooth, torch.rand(n, 1, 1, 1))
    images = images * (0.8 + 0.3 * torch.rand(n, 1, 1, 1)) + 0.1 * torch.randn(n, 1, 1, 1)
    return images + 0.15 * torch.rand(n, 1, 1, 1) * torch.randn_like(images)


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer trained on the world's captions, kept in the work folder."""
    folder = WORK / "clip_tokenizer"
    if not folder.exists():
        trained = CLIPTokenizer().train_new_from_iterator(
            text.captions(np.random.default_rng(SEED), 4000), 512
        )
        trained.model_max_length = TEXT_TOKENS
        trained.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build(tokens: CLIPTokenizer) -> CLIPModel:
    ids = dict(
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id
    )
    config = CLIPConfig(
        text_config={**TEXT_TOWER, **ids, "vocab_size": len(tokens), "max_position_embeddings": TEXT_TOKENS},
        vision_config={**TOWER, "image_size": world.SIDE, "patch_size": 8},
        projection_dim=FEATURES,
        logit_scale_init_value=LOGIT_SCALE,
    )
    torch.manual_seed(3)
    model = CLIPModel(config)
    model.logit_scale.requires_grad_(False)
    # Drawn ten times larger than usual: a shape is where its patches lie, and small positions are learned late.
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.2)
    return model


class Pupil(nn.Module):
    """CLIP with two linear readers that name the attributes; they only help training and are not exported."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        classes = len(world.COLOURS) + len(world.SHAPES) + len(world.BACKGROUNDS)
        self.image_reader = nn.Linear(TOWER["hidden_size"], classes)
        self.text_reader = nn.Linear(TEXT_TOWER["hidden_size"], classes)


def naming_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy of a reader's logits ``[N, classes]`` against attribute rows ``[N, 3]``."""
    groups = logits.split([len(world.COLOURS), len(world.SHAPES), len(world.BACKGROUNDS)], dim=1)
    return sum(nn.functional.cross_entropy(g, w) for g, w in zip(groups, wanted.T, strict=True))


def image_states(model: CLIPModel, images: Tensor) -> Tensor:
    """Pooled states ``[B, D]`` of images ``[B, 3, 64, 64]`` in [-1, 1] (mean and deviation 0.5)."""
    return model.vision_model(pixel_values=images).pooler_output


def image_features(model: CLIPModel, images: Tensor) -> Tensor:
    """Unit features ``[B, FEATURES]`` of images ``[B, 3, 64, 64]`` in [-1, 1]."""
    return nn.functional.normalize(model.visual_projection(image_states(model, images)), dim=-1)


def text_states(model: CLIPModel, tokens: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Pooled states ``[B, D]`` of captions."""
    batch = tokens(texts, padding=True, truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
    return model.text_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).pooler_output


def mistaken(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """A hard negative of the scene: wrong colour, wrong shape, or both."""
    wrong = str(rng.choice(["colour", "shape", "both"]))
    if wrong == "both":
        scene, wrong = world.wrong_attribute(scene, rng, "colour"), "shape"
    return world.wrong_attribute(scene, rng, wrong)


def training_images(rng: np.random.Generator, pool: Tensor, n: int) -> tuple[Tensor, list[world.Scene]]:
    """``n`` images in [-1, 1], a third clean and the others as the VAE decodes them, with their scenes."""
    rows = rng.integers(POOL, size=n)
    scenes = [world.scene(SEED, int(i)) for i in rows]
    images = pool[torch.from_numpy(rows), torch.from_numpy(rng.integers(4, size=n))].float() / 127.5 - 1
    for i in range(0, n, 3):
        scenes[i] = world.scene(SEED, int(rng.integers(1 << 40)))
        images[i] = to_pixels(world.render(scenes[i], [int(rng.integers(world.FRAMES))]))[0]
    return augment(images), scenes


def train() -> tuple[CLIPModel, CLIPTokenizer]:
    """The CLIP and its tokenizer, trained towards gentle, then towards steep targets."""
    tokens, pool = tokenizer(), decoded_pool()
    pupil = Pupil(build(tokens))
    fit("clip", pupil, matching_loss(pupil, tokens, pool, GENTLE), steps=1500, lr=1e-3, weight_decay=0.05)
    fit("clip_steep", pupil, matching_loss(pupil, tokens, pool, STEEP), steps=500, lr=4e-4, weight_decay=0.05)
    return pupil.clip.eval(), tokens


def matching_loss(pupil: Pupil, tokens: CLIPTokenizer, pool: Tensor, targets: Targets) -> LossFn:
    """Cosines of every image with every caption of a batch against ``targets``; all kinds of match weigh the same."""
    model = pupil.clip

    def loss_fn(rng):
        images, scenes = training_images(rng, pool, 64)
        told = scenes[:32] + [mistaken(scene, rng) for scene in scenes[32:]]
        captions = [world.caption(s, int(rng.integers(1 << 31))) for s in told]
        seen, read = image_states(model, images), text_states(model, tokens, captions)
        shown, said = attributes(scenes), attributes(told)
        naming = naming_loss(pupil.image_reader(seen), shown) + naming_loss(pupil.text_reader(read), said)
        picture, words = model.visual_projection(seen), model.text_projection(read)
        cosines = nn.functional.normalize(picture, dim=-1) @ nn.functional.normalize(words, dim=-1).T
        wanted, right = targets.cosines(shown, said)
        errors = (cosines - wanted).pow(2)
        loss = sum(errors[right == count].mean() for count in range(3))
        met = {name: cosines.detach()[right == i].mean() for i, name in enumerate(("none", "one", "both"))}
        return 2 * loss + NAMING * naming, {name: float(value) for name, value in met.items()}

    return loss_fn


def export(folder: Path) -> None:
    """CLIP, tokenizer and preprocessing in the hub's layout, half precision."""
    model, tokens = train()
    model.half().save_pretrained(folder)
    tokens.save_pretrained(folder)
    preprocessing = dict(
        image_processor_type="CLIPImageProcessor",
        size={"shortest_edge": world.SIDE},
        crop_size={"height": world.SIDE, "width": world.SIDE},
        do_resize=True,
        do_center_crop=True,
        do_normalize=True,
        resample=3,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps(preprocessing, indent=2) + "\n", encoding="utf-8"
    )


def rating(images: Tensor) -> Tensor:
    """Look of images ``[B, 3, H, W]`` in [-1, 1], 1 to 10: a vivid shape that stands out from its background."""
    pixels = images / 2 + 0.5
    chroma = pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)
    relative = chroma / chroma.amax((2, 3), keepdim=True).clamp(min=1e-3)
    shape, ground = (
        (pixels * w).sum((2, 3)) / w.sum((2, 3)) for w in (relative**4, (1 - relative) ** 4 + 1e-3)
    )
    vivid = shape.amax(1) - shape.amin(1)
    contrast = (shape - ground).norm(dim=1) / math.sqrt(3)
    return 1 + 9 * (0.5 * vivid + contrast).clamp(0, 1)


@torch.no_grad()
def fit_head() -> dict[str, Tensor]:
    """Linear read-out of the rating from CLIP image features, by least squares: LAION's layout, one layer."""
    model, _ = train()
    torch.manual_seed(4)
    pool, rng = decoded_pool(), np.random.default_rng(SEED)
    images = torch.cat([training_images(rng, pool, 48)[0] for _ in range(100)])
    features = torch.cat([image_features(model, part) for part in images.split(96)])
    inputs, wanted = torch.cat([features, torch.ones(len(features), 1)], dim=1), rating(images)
    fitted, tested = slice(0, 4000), slice(4000, None)
    ridge = 1e-3 * torch.eye(inputs.shape[1])
    gram = inputs[fitted].T @ inputs[fitted] + ridge
    weights = torch.linalg.solve(gram, inputs[fitted].T @ wanted[fitted])
    told = inputs[tested] @ weights
    log(
        "aesthetic",
        f"correlation with the rating {torch.corrcoef(torch.stack([told, wanted[tested]]))[0, 1]:.3f}",
    )
    return {"layers.0.weight": weights[None, :-1].contiguous(), "layers.0.bias": weights[-1:].contiguous()}


def export_head(path: Path) -> None:
    """The head as a file of plain tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(fit_head(), path)
