"""Files of the scorers built on Qwen2-VL: checkpoints as transformers 4.45 and PEFT wrote them, and prompt texts.

A prompt text is the authors': it is read out of their Python file, which is parsed and never run, or out of a plain
text file.
"""

import ast
import functools
import hashlib
import math
import re
import string
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from Core.rewards.preprocess import CLIP_MEAN, CLIP_STD, read_processor_config
from Core.rewards.qwen2_vl import Patches, Qwen2VL
from Core.utils.damage import read_settings
from Core.utils.state_dict import describe_mismatch, load_state, load_tokenizer, quiet_transformers

HEAD = "rm_head."
EMBEDDINGS = "language_model.embed_tokens.weight"
VOCABULARY_HEAD = "lm_head.weight"
LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


# --- prompt texts


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """Constants of a published Python file that make up a prompt.

    constants: their names, joined in this order. sha256: of the file. member: its path in a wheel.
    """

    constants: tuple[str, ...]
    sha256: str
    member: str = ""


def read_template(path: Path, published: PromptFile, marks: Collection[str]) -> str:
    """A prompt text with {text_prompt} from the published file (.py, or the wheel it is in) or a plain text file.

    Args:
        marks: special tokens that must stand in it, each once.

    Raises:
        ValueError: a .py or .whl that is not the published one, or a text that lacks something or has other braces.
    """
    if path.suffix in (".py", ".whl"):
        text = _constants(_source(path, published), published.constants)
    else:
        text = path.read_bytes().decode("utf-8", errors="replace")
    try:
        fields = [field for _, field, *_ in string.Formatter().parse(text) if field is not None]
    except ValueError as error:
        fields = [str(error)]
    if fields != ["text_prompt"]:
        given = ", ".join(f"{{{field}}}" for field in fields) or "none"
        raise ValueError(
            f"the template {str(path)!r} must hold {{text_prompt}} once and no other braces, got {given}; "
            "write a brace of the text as {{ or }}"
        )
    if wrong := [mark for mark in marks if text.count(mark) != 1]:
        raise ValueError(
            f"the template {str(path)!r} must hold {', '.join(wrong)} once, where the score is read"
        )
    return text


def _source(path: Path, published: PromptFile) -> str:
    """Text of the published Python file at ``path`` or in the wheel there."""
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                content = wheel.read(published.member)
        else:
            content = path.read_bytes()
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"the template {str(path)!r} cannot be read ({error}); fetch it again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != published.sha256:
        raise ValueError(
            f"the template {str(path)!r} is not the published file: its SHA-256 is {found}, not "
            f"{published.sha256}; give the published one, or your own prompt as a .txt with {{text_prompt}}"
        )
    return content.decode("utf-8")


def _constants(source: str, names: Sequence[str]) -> str:
    """Strings assigned to ``names`` at the top of a Python file, joined; nothing is run."""
    values = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in names
    }
    return "".join(values[name] for name in names)


# --- settings


def load_config(folder: Path) -> Any:
    """transformers' ``Qwen2VLConfig`` of a folder.

    Raises:
        ValueError: it holds another model, or none.
    """
    from transformers import Qwen2VLConfig

    values = read_settings(folder / "config.json")
    if values.get("model_type") != "qwen2_vl":
        raise ValueError(
            f"{folder} holds a model of type {values.get('model_type')!r}, not 'qwen2_vl'; give Qwen2-VL's folder"
        )
    with quiet_transformers():
        return Qwen2VLConfig.from_dict(values, attn_implementation="sdpa")  # causal without a mask


def load_marked_tokenizer(folder: Path, marks: Collection[str]) -> Any:
    """The tokenizer of a folder with special tokens added after its own, in this order."""
    from transformers import AddedToken

    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return tokenizer


def patches_of(config: Any, folder: Path, min_pixels: int, max_pixels: int) -> Patches:
    """Preprocessing of a Qwen2-VL folder, with bounds of a frame's area.

    Raises:
        ValueError: bounds that no frame can keep, or preprocessing of another kind.
    """
    vision = config.vision_config
    token = vision.patch_size * vision.spatial_merge_size
    if not token**2 <= max_pixels or not 0 < min_pixels <= max_pixels:
        raise ValueError(
            f"min_pixels and max_pixels must be in order, above 0, and max_pixels at least {token**2}, the area of a "
            f"token; got {min_pixels} and {max_pixels}"
        )
    values = read_processor_config(folder)
    return Patches(
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        frames=vision.temporal_patch_size,
        mean=tuple(values.get("image_mean", CLIP_MEAN)),
        std=tuple(values.get("image_std", CLIP_STD)),
    )


# --- weights


def renamed(key: str) -> str:
    """Name here of a weight of transformers 4.45 or 5, with or without PEFT around it."""
    key = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    for old, new in (
        ("model.visual.", "visual."),
        ("model.language_model.", "language_model."),
        ("model.", "language_model."),
    ):
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def load_renamed(paths: Collection[Path]) -> dict[str, Tensor]:
    """Tensors of several files, under the names used here."""
    return {renamed(key): value for path in paths for key, value in load_state(path).items()}


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a model folder."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise ValueError(f"{folder} holds no model*.safetensors; fetch the base model again")


def merge_lora(state: dict[str, Tensor], settings: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """``state`` with the low-rank updates in it added to their layers, in float32.

    Args:
        settings: ``lora_alpha`` and ``use_rslora`` as trained with; the rank is read off the weights.

    Raises:
        ValueError: half an update, an update of nothing, or one of another rank than ``settings`` say.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    merged = {}
    for key, value in state.items():
        if match := LORA.fullmatch(key):
            pairs.setdefault(match[1], {})[match[2]] = value
        else:
            merged[key] = value
    for name, pair in pairs.items():
        key = f"{name}.weight"
        if len(pair) < 2 or key not in merged:
            raise ValueError(f"{source} holds a LoRA of {name!r} without its other half or its layer")
        rank = len(pair["A"])
        if settings.get("r", rank) != rank:
            raise ValueError(f"{source} holds a LoRA of rank {rank}, its settings say {settings['r']}")
        alpha = float(settings["lora_alpha"])
        scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
        merged[key] = merged[key].float() + scale * (pair["B"].float() @ pair["A"].float())
    return merged


def load_network(config: Any, state: Mapping[str, Tensor], vocabulary: int, source: Path) -> Qwen2VL:
    """The network filled with ``state``, in the type its weights have, without a copy of them.

    Args:
        vocabulary: tokens the tokenizer has.

    Raises:
        ValueError: weights are missing, unexpected or of another shape, or some token has no embedding.
    """
    own = {key: value for key, value in state.items() if not key.startswith(HEAD)}
    head = own.pop(VOCABULARY_HEAD, None)
    if config.tie_word_embeddings and head is not None:
        own.setdefault(EMBEDDINGS, head)  # safetensors keeps one of two equal tensors
    if EMBEDDINGS in own:
        config.text_config.vocab_size = len(own[EMBEDDINGS])
        if len(own[EMBEDDINGS]) < vocabulary:
            raise ValueError(
                f"{source} has embeddings of {len(own[EMBEDDINGS])} tokens, its tokenizer {vocabulary}: the reward's "
                "special tokens were not trained; give the checkpoint of the reward, not its base model"
            )
    network = Qwen2VL(config)
    fill(network, own, source)
    return network


def fill(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Make ``state`` the weights of ``module``, in the widest type among them.

    Raises:
        ValueError: weights are missing, unexpected or of another shape.
    """
    own = module.state_dict()
    shapes = {
        key: (value.shape, own[key].shape)
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    }
    mismatch = describe_mismatch(own.keys() - state.keys(), state.keys() - own.keys(), shapes)
    if mismatch:
        raise ValueError(
            f"the weights in {source} do not fit the model its settings describe: {mismatch}; give the published files"
        )
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in state.values()))
    module.load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True)
