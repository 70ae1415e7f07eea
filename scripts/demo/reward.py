"""Stage ``clip`` and the aesthetic head fitted on it at export: the demo's reward models.

The CLIP's cosine is regressed to explicit targets, not trained contrastively, in two phases. The gentle phase (all
right ≈ 1, colour or shape wrong ≈ 0.26, both wrong ≈ -0.07) teaches it both attributes; the steep phase (1, 0, -0.2)
spreads the scores, so that the gap between the base model's videos and true ones stays large. Half of the images are
neither right nor wrong: they lie between two shapes or colours, or are faded, and their targets lie in between. A
reward that only separates right from wrong is flat in between, where its gradient is noise.
"""

import json
import math
from collections.abc import Sequence
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
LOGIT_SCALE = math.log(100)  # PickScore's scale: a cosine of 1 scores 100
BACKGROUND = 0.05  # added to the target cosine for a matching background

NAMING = 0.2  # weight of the readers' cross entropy
PICTURES = 2  # random stream of the pictures, separate from the scenes' (world.scene)
POOL = 2560  # pictures whose decoded frames are kept
CLASSES = [len(world.COLOURS), len(world.SHAPES), len(world.BACKGROUNDS)]
PIXEL_MEAN, PIXEL_STD = 0.5, 0.5


@dataclass(frozen=True)
class Targets:
    """Target cosines for ``none``, ``one`` or ``both`` of colour and shape being right."""

    none: float
    one: float
    both: float

    def cosines(self, shown: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, M]`` target cosines and numbers of right attributes (colour, shape), images against captions."""
        pairs = zip(shown.split(CLASSES, dim=1), said.split(CLASSES, dim=1), strict=True)
        colour, shape, background = (a @ b.T for a, b in pairs)
        step, bonus = self.one - self.none, self.both - 2 * self.one + self.none
        wanted = self.none + step * (colour + shape) + bonus * colour * shape + BACKGROUND * background
        return wanted, (colour + shape).round().long()


GENTLE = Targets(none=-0.12, one=0.21, both=0.95)
STEEP = Targets(none=-0.25, one=-0.02, both=0.95)


@dataclass(frozen=True)
class Picture:
    """Contents of an image: a scene, blended by these shares towards another's shape and colour, and towards grey."""

    scene: world.Scene
    towards: world.Scene
    shape: float = 0.0
    colour: float = 0.0
    fade: float = 0.0

    def render(self, frames: Sequence[int] = range(world.FRAMES)) -> np.ndarray:
        return world.render(self.scene, frames, self.towards, self.shape, self.colour, self.fade)


def picture(index: int) -> Picture:
    """Picture ``index``; half of them are plain scenes."""
    rng = np.random.default_rng([SEED, index, PICTURES])
    scene, towards = (world.scene(SEED, i) for i in (index, int(rng.integers(1 << 40))))
    if rng.random() < 0.5:
        return Picture(scene, scene)
    kind, share, fade = rng.choice(["shape", "colour", "fade"], p=[0.6, 0.2, 0.2]), rng.random(), rng.random()
    if kind == "fade":
        return Picture(scene, scene, fade=fade)
    return Picture(scene, towards, **{kind: share}, fade=fade * (rng.random() < 0.4))


def attributes(pictures: Sequence[Picture]) -> Tensor:
    """Shares of every colour, shape and background, ``[N, sum(CLASSES)]``."""
    rows = []
    for p in pictures:
        colour, shape, background = (np.zeros(n) for n in CLASSES)
        for seen, by_shape, by_colour in (
            (p.scene, 1 - p.shape, 1 - p.colour),
            (p.towards, p.shape, p.colour),
        ):
            colour[list(world.COLOURS).index(seen.colour)] += by_colour * (1 - p.fade)
            shape[world.SHAPES.index(seen.shape)] += by_shape
        background[world.BACKGROUNDS.index(p.scene.background)] = 1
        rows.append(np.concatenate([colour, shape, background]))
    return torch.from_numpy(np.stack(rows)).float()


@torch.no_grad()
def decoded_pool() -> Tensor:
    """Decoded frames, ``uint8 [POOL, 4, 3, 64, 64]``: two from the whole clip, two latent frames decoded alone.

    The latents carry noise of up to 0.4 of their spread, like a denoiser's output. Row ``i`` is ``picture(i)``.
    """
    path = WORK / "decoded_pool.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    pipeline = vae.train_decoder()
    generator, parts = torch.Generator().manual_seed(SEED), []
    for start in range(0, POOL, 16):
        clips = np.stack([picture(i).render() for i in range(start, start + 16)])
        z = pipeline.encode(to_pixels(clips).transpose(1, 2))
        noise = torch.randn(z.shape, generator=generator)
        z = z + 0.4 * torch.rand(16, 1, 1, 1, 1, generator=generator) * noise
        raw = z * pipeline.scale + pipeline.shift
        whole = pipeline.temporal_vae.decode(raw, num_frames=world.FRAMES)
        picks = torch.randint(world.FRAMES, (2,), generator=generator)
        alone = torch.randint(z.shape[2], (2,), generator=generator)
        frames = [whole[:, :, f] for f in picks]
        frames += [pipeline.temporal_vae.decode(raw[:, :, k : k + 1], num_frames=1)[:, :, 0] for k in alone]
        pixels = vae.decode_frames(pipeline.spatial_vae.module, torch.cat(frames)).unflatten(0, (4, 16))
        parts.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().transpose(0, 1))
        if (start + 16) % 256 == 0:
            log("clip", f"decoded {start + 16}/{POOL} pictures")
    save(torch.cat(parts), path)
    return torch.cat(parts)


def augment(images: Tensor) -> Tensor:
    """Random shift (per batch), blur, contrast, brightness and noise (per image) on ``[B, 3, 64, 64]`` in [-1, 1]."""
    n = len(images)
    shifts = torch.randint(-3, 4, (2,)).tolist()
    images = nn.functional.pad(images, (3, 3, 3, 3), mode="replicate")
    images = images[:, :, 3 + shifts[0] : 67 + shifts[0], 3 + shifts[1] : 67 + shifts[1]]
    smooth = nn.functional.avg_pool2d(nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images.lerp(smooth, torch.rand(n, 1, 1, 1))
    images = images * (0.8 + 0.3 * torch.rand(n, 1, 1, 1)) + 0.1 * torch.randn(n, 1, 1, 1)
    return images + 0.3 * torch.rand(n, 1, 1, 1) * torch.randn_like(images)


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer trained on the world's captions; cached on disk, since its trainer breaks ties randomly."""
    folder = WORK / "clip_tokenizer"
    if not folder.exists():
        trained = CLIPTokenizer().train_new_from_iterator(
            text.captions(np.random.default_rng(SEED), 4000), 512
        )
        trained.model_max_length = TEXT_TOKENS
        partial = folder.with_suffix(".partial")
        trained.save_pretrained(partial)
        partial.replace(folder)
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
    # Ten times the usual scale: shape depends on patch positions, and small position embeddings are learned late.
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.2)
    return model


class Pupil(nn.Module):
    """CLIP with two linear heads that classify the attributes; they only help training and are not exported."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.image_reader = nn.Linear(TOWER["hidden_size"], sum(CLASSES))
        self.text_reader = nn.Linear(TEXT_TOWER["hidden_size"], sum(CLASSES))


def naming_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of a head's logits ``[N, sum(CLASSES)]`` against attributes of the same shape."""
    groups = zip(logits.split(CLASSES, dim=1), wanted.split(CLASSES, dim=1), strict=True)
    return sum(nn.functional.cross_entropy(logit, share) for logit, share in groups)


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


def training_images(rng: np.random.Generator, pool: Tensor, n: int) -> tuple[Tensor, list[Picture]]:
    """``n`` images in [-1, 1], a third clean and the rest decoded by the VAE, with their contents."""
    rows = rng.integers(POOL, size=n)
    pictures = [picture(int(i)) for i in rows]
    images = pool[torch.from_numpy(rows), torch.from_numpy(rng.integers(4, size=n))].float() / 127.5 - 1
    for i in range(0, n, 3):
        pictures[i] = picture(int(rng.integers(1 << 40)))
        images[i] = to_pixels(pictures[i].render([int(rng.integers(world.FRAMES))]))[0]
    return augment(images), pictures


def train() -> tuple[CLIPModel, CLIPTokenizer]:
    """Train the CLIP and its tokenizer, with gentle then steep targets."""
    tokens, pool = tokenizer(), decoded_pool()
    pupil = Pupil(build(tokens))
    fit("clip", pupil, matching_loss(pupil, tokens, pool, GENTLE), steps=1500, lr=1e-3, weight_decay=0.05)
    fit(
        "clip_steep", pupil, matching_loss(pupil, tokens, pool, STEEP), steps=1000, lr=5e-4, weight_decay=0.05
    )
    return pupil.clip.eval(), tokens


def matching_loss(pupil: Pupil, tokens: CLIPTokenizer, pool: Tensor, targets: Targets) -> LossFn:
    """Regress cosines of all image-caption pairs in a batch to ``targets``; all kinds of match weigh the same."""
    model = pupil.clip

    def loss_fn(rng):
        images, pictures = training_images(rng, pool, 64)
        told = [p.scene if i < 32 else mistaken(p.scene, rng) for i, p in enumerate(pictures)]
        captions = [world.caption(s, int(rng.integers(1 << 31))) for s in told]
        seen, read = image_states(model, images), text_states(model, tokens, captions)
        shown, said = attributes(pictures), attributes([Picture(scene, scene) for scene in told])
        naming = naming_loss(pupil.image_reader(seen), shown) + naming_loss(pupil.text_reader(read), said)
        image_vectors, text_vectors = model.visual_projection(seen), model.text_projection(read)
        cosines = (
            nn.functional.normalize(image_vectors, dim=-1) @ nn.functional.normalize(text_vectors, dim=-1).T
        )
        wanted, right = targets.cosines(shown, said)
        errors = (cosines - wanted).pow(2)
        loss = sum(errors[right == count].mean() for count in range(3))
        met = {name: cosines.detach()[right == i].mean() for i, name in enumerate(("none", "one", "both"))}
        return 2 * loss + NAMING * naming, {name: float(value) for name, value in met.items()}

    return loss_fn


def export(folder: Path) -> None:
    """Save CLIP, tokenizer and preprocessing in the Hub's layout, in half precision."""
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
    """Aesthetic rating (1 to 10) of images ``[B, 3, H, W]`` in [-1, 1]: a vivid shape, distinct from its background."""
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
    """Least-squares linear head from CLIP image features to the rating, in LAION's layout with one layer."""
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
    """Save the head as a file of plain tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(fit_head(), path)
