"""SigLIP and SigLIP 2 towers in the transformers layout (Zhai et al. 2023, Tschannen et al. 2025)."""

from pathlib import Path

from torch import nn

from Core.rewards.clip import ImageTower, TextTower
from Core.rewards.preprocess import Fit, ImageTransform, transform_from_folder
from Core.utils.state_dict import load_strictly, load_tokenizer

MEAN = STD = (0.5, 0.5, 0.5)
TEXT_HALF = r"text_model\..*|logit_scale|logit_bias"


def siglip_transform(folder: Path, side: int, resize: Fit | None) -> ImageTransform:
    """Transform of a SigLIP folder, with another ``fit`` if ``resize`` asks for one."""
    default = ImageTransform(height=side, width=side, fit="squash", mean=MEAN, std=STD)
    return transform_from_folder(folder, side, default).with_fit(resize)


def load_siglip_image(folder: Path, resize: Fit | None) -> ImageTower:
    """Vision half of a SigLIP folder."""
    from transformers import SiglipVisionModel

    model = load_strictly(SiglipVisionModel, folder, unused=TEXT_HALF)
    return ImageTower(model, nn.Identity(), siglip_transform(folder, model.config.image_size, resize))


def load_siglip(folder: Path, resize: Fit | None) -> tuple[ImageTower, TextTower]:
    """Both halves of a SigLIP folder, or of a SigLIP 2 of fixed resolution, which has the same layout."""
    from transformers import SiglipModel

    model = load_strictly(SiglipModel, folder)
    transform = siglip_transform(folder, model.config.vision_config.image_size, resize)
    tokenizer = load_tokenizer(folder)
    # SigLIP 2 was trained on lower-case text, which Gemma's tokenizer does not make by itself.
    clean = str.lower if "gemma" in type(tokenizer).__name__.lower() else str
    # Both were trained on text padded to full length, without an attention mask.
    text = TextTower(model.text_model, nn.Identity(), tokenizer, padding="max_length", clean=clean)
    return ImageTower(model.vision_model, nn.Identity(), transform), text
