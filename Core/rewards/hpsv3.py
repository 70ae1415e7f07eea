"""Human Preference Score v3 (Ma et al. 2025, arXiv:2508.03789): Qwen2-VL-7B with a head for mean and deviation.

Axes: N images, D features.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from Core.modules.quantization import store_linears_in_nf4
from Core.rewards.base import ImageReward, RewardInfo
from Core.rewards.qwen2_vl import Reader, token_errors
from Core.rewards.qwen2_vl_files import (
    HEAD,
    PromptFile,
    fill,
    load_config,
    load_marked_tokenizer,
    load_network,
    load_renamed,
    patches_of,
    read_template,
)
from Core.utils.hub import Weight, locate

MARKS = ("<|Reward|>",)
PIXELS = 256 * 28 * 28
HEAD_LAYERS = (0, 3, 5)  # numbers of its linear layers; between them ReLU, and dropout after the first
PROMPT = PromptFile(
    constants=("INSTRUCTION", "prompt_with_special_token"),
    sha256="b0f936e89f8df652c67d470412e1d9afd27aa711dec85724c19989ac91e7a3e3",
    member="hpsv3/dataset/data_collator_qwen.py",
)
WHEEL = "hpsv3-1.0.0-py3-none-any.whl"
PROMPT_WEIGHT = Weight(
    source="https://files.pythonhosted.org/packages/20/ed/"
    f"6feb979b0086f57dc7a8b545693e1dbeffd60c8d942971e0445c65fcf438/{WHEEL}",
    kind="file",
    file=WHEEL,
    size=69_000,
    sha256="1a1b3ed1f538315ddf0e90c55b9f5c8ab3248d772cd713c11f7dfe35bf867ab3",
    licence="MIT",
)
MODEL = Weight(
    source="MizzenAI/HPSv3", kind="file", file="HPSv3.safetensors", size=17_000_000_000, licence="MIT"
)
BASE = Weight(source="Qwen/Qwen2-VL-7B-Instruct", kind="tokenizer", size=11_500_000, licence="Apache-2.0")


def load_head(state: Mapping[str, Tensor], width: int, source: Path) -> nn.Module:
    """The head [N, width] → [N, 2]; its inner widths are read off the weights.

    Raises:
        ValueError: the weights are not those of such a head.
    """
    own = {key.removeprefix(HEAD): value for key, value in state.items() if key.startswith(HEAD)}
    if missing := [f"{HEAD}{i}.weight" for i in HEAD_LAYERS if f"{i}.weight" not in own]:
        raise ValueError(
            f"{source} is not HPSv3: it has no {', '.join(missing)}; give the published HPSv3.safetensors"
        )
    first, second, _ = (len(own[f"{i}.weight"]) for i in HEAD_LAYERS)
    with torch.device("meta"):
        head = nn.Sequential(
            nn.Linear(width, first),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, 2),
        )
    fill(head, own, source)
    return head.float()


class HPSv3(ImageReward):
    """The mean μ of the preference predicted for an image and its prompt; loss −score.

    The head stays in float32. In bf16 the weights take 15.5 GB by calculation; the file's vocabulary head is left out.

    Args:
        model: hub id, folder or file of the weights.
        base: Qwen2-VL's configuration and tokenizer, as hub id or folder; its weights are not needed.
        template: the authors' ``data_collator_qwen.py`` or the wheel it is in, or a text file with your own prompt, in
            which ``{text_prompt}`` and ``<|Reward|>`` stand.
        nf4: keep the layers in 4 bits: by calculation 5 GB of weights in all.
        min_pixels: area below which images are enlarged.
        max_pixels: area above which images are reduced.
    """

    info = RewardInfo(
        name="hpsv3",
        summary="Qwen2-VL fine-tuned on human preferences over a wide spectrum of images",
        range="usually 0 to 15",
        paper="Ma et al. 2025, arXiv:2508.03789",
        weights={"model": MODEL, "base": BASE, "template": PROMPT_WEIGHT},
    )
    full_precision = ("head",)
    slice_size = 1

    def __init__(
        self,
        *,
        model: str = MODEL.source,
        base: str = BASE.source,
        template: str = PROMPT_WEIGHT.source,
        nf4: bool = False,
        min_pixels: int = PIXELS,
        max_pixels: int = PIXELS,
    ):
        super().__init__()
        required = self.required_weights({"model": model, "base": base, "template": template})
        text = read_template(locate(required["template"]), PROMPT, MARKS)
        folder = locate(required["base"])
        config, tokenizer = load_config(folder), load_marked_tokenizer(folder, MARKS)
        patches = patches_of(config, folder, min_pixels, max_pixels)
        file = locate(required["model"])
        state = load_renamed([file])
        head = load_head(state, config.text_config.hidden_size, file)
        network = load_network(config, state, len(tokenizer), file)
        if nf4:
            store_linears_in_nf4(network.blocks)
        self.reader = Reader(network, tokenizer, patches, text, MARKS, "image")
        self.head = head

    @classmethod
    def prompt_errors(cls, args: Mapping[str, Any], prompts: Sequence[str]) -> list[str]:
        return token_errors(prompts, "image", MARKS)

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        hidden = self.reader(images[:, None], prompts)[:, 0]
        mean, _ = self.head(hidden.to(self.head[0].weight.dtype)).unbind(dim=-1)
        return mean
