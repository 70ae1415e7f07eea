"""VideoAlign's reward for whole clips: Qwen2-VL-2B, trained on human preferences (Liu et al. 2025, arXiv:2501.13918).

The published folder holds ``model_config.json`` and ``checkpoint-<n>/`` with the whole model or with an adapter over
Qwen2-VL; see https://github.com/KwaiVGI/VideoAlign.

Axes: B clips, F frames, H, W pixels, 3 dimensions (VQ, MQ, TA).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from Core.rewards.base import RewardInfo, RewardOutput, VideoReward
from Core.rewards.qwen2_vl import Reader, token_errors
from Core.rewards.qwen2_vl_files import (
    HEAD,
    PromptFile,
    fill,
    load_config,
    load_marked_tokenizer,
    load_network,
    load_renamed,
    merge_lora,
    patches_of,
    read_template,
    weight_files,
)
from Core.utils.damage import read_settings
from Core.utils.hub import Weight, locate

DIMENSIONS = ("VQ", "MQ", "TA")
MARKS = tuple(f"<|{name}_reward|>" for name in DIMENSIONS)
SETTINGS = "model_config.json"
WHOLE = "model.pth"
ADAPTER = ("adapter_model.safetensors", "non_lora_state_dict.pth")
MIN_PIXELS = 128 * 28 * 28  # a frame's, as qwen-vl-utils has it for videos
FRAME_STEP = 2  # frames are counted in pairs
PROMPT = PromptFile(
    constants=("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",),
    sha256="8fb42f91fd7440a1c9a377e78f36d67da6132eb348f402eecbeb57e41f138ae9",
)
PROMPT_WEIGHT = Weight(
    source="https://raw.githubusercontent.com/KwaiVGI/VideoAlign/"
    "219ab9db64c045e5181a2202d11f686439351292/prompt_template.py",
    kind="file",
    file="prompt_template.py",
    size=20_000,
    sha256=PROMPT.sha256,
    licence="MIT",
)
MODEL = Weight(
    source="KwaiVGI/VideoReward",
    kind="checkpoint",
    layouts=(
        (SETTINGS, f"checkpoint-*/{WHOLE}"),
        (SETTINGS, *(f"checkpoint-*/{name}" for name in ADAPTER)),
    ),
    size=4_600_000_000,  # by its parameters in bf16
    licence="MIT",
)
TOKENIZER = Weight(
    source="Qwen/Qwen2-VL-2B-Instruct", kind="tokenizer", size=11_500_000, licence="Apache-2.0"
)
BASE = Weight(source=TOKENIZER.source, parts=("tokenizer",), size=4_430_000_000, licence=TOKENIZER.licence)


def newest_checkpoint(folder: Path) -> Path:
    """``checkpoint-<n>`` with the largest n.

    Raises:
        ValueError: there is none.
    """
    numbered = [
        (int(n), p) for p in folder.glob("checkpoint-*") if (n := p.name.rpartition("-")[2]).isdigit()
    ]
    if not numbered:
        raise ValueError(f"{folder} has no checkpoint-<n>; give the folder that VideoReward was published in")
    return max(numbered)[1]


def refuse_other_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError on a model of another kind than the published one."""
    model = settings.get("model_config", {})
    expected = {"output_dim": 1, "use_special_tokens": True, "reward_token": "special"}
    wrong = [f"{key}={model.get(key)!r}" for key, value in expected.items() if model.get(key) != value]
    if wrong:
        raise ValueError(
            f"{path} describes a reward with {', '.join(wrong)}; it can be "
            f"{', '.join(f'{key}={value!r}' for key, value in expected.items())}"
        )


def lora_settings(settings: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """PEFT's ``r``, ``lora_alpha`` and ``use_rslora``, from the reward's settings or else from the adapter's."""
    own = settings.get("peft_lora_config") or {}
    if "lora_alpha" in own:
        named = {"r": own.get("lora_r"), "lora_alpha": own["lora_alpha"], "use_rslora": own.get("use_rslora")}
        return {key: value for key, value in named.items() if value is not None}
    return read_settings(checkpoint / "adapter_config.json")


def load_reward_state(checkpoint: Path, base: Weight, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of a checkpoint under the names used here, with its LoRA merged.

    Raises:
        ValueError: files are missing or damaged, or do not belong together.
    """
    if (checkpoint / WHOLE).is_file():
        state = load_renamed([checkpoint / WHOLE])
    else:
        files = [checkpoint / name for name in ADAPTER]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{checkpoint} has no {WHOLE} and no {', '.join(missing)}; fetch it again")
        state = load_renamed([*weight_files(locate(base)), *files])
    if any(".lora_" in key for key in state):
        state = merge_lora(state, lora_settings(settings, checkpoint), checkpoint)
    return state


class VideoAlign(VideoReward):
    """Visual quality (VQ), motion quality (MQ) and text alignment (TA) of a clip, summed; loss −score.

    Each is normalised by the mean and deviation in the model's settings. All three are logged. The network
    was trained on frames evenly spaced over a whole video, 2 a second. Frames that ``decode_frame`` picks should be
    many and evenly spaced too (``"all"``); fewer than 4 are refused.
    As a monitor, use a scorer of another kind.

    Args:
        model: hub id or folder with ``model_config.json`` and ``checkpoint-<n>``, of which the newest is taken.
        base: Qwen2-VL's configuration and tokenizer, and its weights if the checkpoint is an adapter; hub id or folder.
        template: the authors' ``prompt_template.py``, or a text file with your own prompt, in which ``{text_prompt}``
            and ``<|VQ_reward|>``, ``<|MQ_reward|>``, ``<|TA_reward|>`` stand.
        vq: weight of visual quality in the score.
        mq: weight of motion quality.
        ta: weight of text alignment.
        min_pixels: area below which frames are enlarged.
        max_pixels: area above which frames are reduced; by default as the model's settings say (release: 200704).
    """

    info = RewardInfo(
        name="videoalign",
        summary="visual quality, motion quality and text alignment of a clip, by a Qwen2-VL trained on preferences",
        range="about -6 to 6, a sum of three normalised scores",
        paper="Liu et al. 2025, arXiv:2501.13918",
        weights={"model": MODEL, "base": TOKENIZER, "template": PROMPT_WEIGHT},
    )
    full_precision = ("head",)
    slice_size = 1
    min_frames = 4

    def __init__(
        self,
        *,
        model: str = MODEL.source,
        base: str = BASE.source,
        template: str = PROMPT_WEIGHT.source,
        vq: float = 1.0,
        mq: float = 1.0,
        ta: float = 1.0,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int | None = None,
    ):
        super().__init__()
        required = self.required_weights({"model": model, "base": base, "template": template})
        folder, base_folder = locate(required["model"]), locate(required["base"])
        settings = read_settings(folder / SETTINGS)
        refuse_other_settings(settings, folder / SETTINGS)
        data, statistics = settings.get("data_config", {}), settings.get("inference_config") or {}
        text = read_template(locate(required["template"]), PROMPT, MARKS)
        config, tokenizer = load_config(base_folder), load_marked_tokenizer(base_folder, MARKS)
        limit = max_pixels or data.get("max_frame_pixels", 200_704)
        patches = patches_of(config, base_folder, min_pixels, limit)
        checkpoint = newest_checkpoint(folder)
        state = load_reward_state(checkpoint, BASE.at(base), settings)
        network = load_network(config, state, len(tokenizer), checkpoint)
        with torch.device("meta"):
            head = nn.Linear(config.text_config.hidden_size, 1, bias=False)
        fill(head, {k.removeprefix(HEAD): v for k, v in state.items() if k.startswith(HEAD)}, checkpoint)
        self.reader = Reader(network, tokenizer, patches, text, MARKS, "video")
        self.head = head
        self.weights = (vq, mq, ta)
        self.mean = [float(statistics.get(f"{name}_mean", 0)) for name in DIMENSIONS]
        self.deviation = [float(statistics.get(f"{name}_std", 1)) for name in DIMENSIONS]
        self.rate, self.frames = data.get("fps") or 2.0, data.get("num_frames")

    @classmethod
    def required_weights(cls, args: Mapping[str, Any]) -> dict[str, Weight]:
        required = super().required_weights(args)
        model = required["model"]
        folder = Path(model.source).expanduser()
        if model.is_local and not any(folder.glob(f"checkpoint-*/{WHOLE}")):
            required["base"] = BASE.at(args.get("base", BASE.source))
        return required

    @classmethod
    def prompt_errors(cls, args: Mapping[str, Any], prompts: Sequence[str]) -> list[str]:
        return token_errors(prompts, "video", MARKS)

    def sample_frames(self, count: int, fps: float | None) -> Tensor:
        """2 frames a second, or what the settings say instead: an even number, at least 4 and at most all."""
        wanted = self.frames or (fps and max(count / fps * self.rate, self.min_frames))
        if not wanted or count < self.min_frames:
            return super().sample_frames(count, fps)
        pairs = min(round(wanted / FRAME_STEP), count // FRAME_STEP)
        return torch.linspace(0, count - 1, pairs * FRAME_STEP).round().long()

    def dimensions(self, clips: Tensor, prompts: list[str]) -> Tensor:
        """VQ, MQ and TA [B, 3] of clips [B, F, 3, H, W] in [0, 1], normalised, in float32 or better."""
        hidden = self.reader(clips, prompts)
        raw = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return (raw - raw.new_tensor(self.mean)) / raw.new_tensor(self.deviation)

    def score_clips(self, clips: Tensor, prompts: list[str]) -> Tensor:
        return self.weighted(self.dimensions(clips, prompts))

    def weighted(self, dimensions: Tensor) -> Tensor:
        """The score [B] of [B, 3]."""
        return dimensions @ dimensions.new_tensor(self.weights)

    def evaluate(self, frames: Tensor, prompts: list[str]) -> RewardOutput:
        self.check_count(frames)
        dimensions = self.in_slices(self.dimensions, frames, prompts, len(DIMENSIONS))
        score = self.weighted(dimensions)
        parts = dict(zip(DIMENSIONS, dimensions.detach().unbind(dim=1), strict=True))
        return RewardOutput(score, self.loss(score), {self.info.name: score.detach(), **parts})
