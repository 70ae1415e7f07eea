"""LoRA adapters through PEFT: attach, save, load. A target or key that matches nothing is an error."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from opensora.utils.ckpt_utils import describe_mismatch, read_state

ADAPTER = "default"
REFERENCE_ALPHA = 8  # PEFT's default, which the reference implementation left as it was


@dataclass(frozen=True)
class Adapter:
    """An adapter read from disk: its weights by PEFT key, and what it takes to attach it."""

    state: dict[str, Tensor]
    rank: int
    alpha: int
    targets: tuple[str, ...]


def attach(
    model: nn.Module,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    seed: int = 0,
) -> PeftModel:
    """Wrap ``model`` with a float32 adapter on every linear layer whose name ends in one of ``targets``.

    Only the adapter requires gradients, and only its dropout ever leaves eval mode.

    Raises:
        ValueError: a target matches no layer.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            last = sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(
                f"lora_targets: no linear layer is named {target!r}; there are {', '.join(last)}"
            )
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, settings)
    return wrapped.eval()


def parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The adapter's weights by their key on disk, in a fixed order."""
    marker = f".{ADAPTER}"
    return {name.replace(marker, ""): p for name, p in model.named_parameters() if "lora_" in name}


def set_dropout(model: PeftModel, active: bool) -> None:
    """Switch the adapter's dropout on for training, off for anything else."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train(active)


def set_scale(model: PeftModel, scale: float) -> None:
    """Strength of the adapter relative to alpha / rank."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale(ADAPTER, scale)


def save(model: PeftModel, folder: Path) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``; the folder appears whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    (partial / "README.md").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def read(path: str | Path) -> Adapter:
    """An adapter folder in PEFT's layout, one ``.safetensors``, or the reference's ``peft_model_<step>.pt``.

    Raises:
        FileNotFoundError, ValueError: nothing there, or not an adapter.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    state = {key.replace(f".{ADAPTER}.", "."): value.float() for key, value in read_state(path).items()}
    downs = [key for key in state if key.endswith("lora_A.weight")]
    if not downs or len(state) != 2 * len(downs):
        raise ValueError(
            f"{path} is no LoRA adapter: it holds {len(state)} tensors, {len(downs)} of them lora_A"
        )
    rank = state[downs[0]].shape[0]
    targets = tuple(sorted({key.split(".")[-3] for key in downs}))
    config = folder / "adapter_config.json"
    alpha = REFERENCE_ALPHA
    if config.is_file() and path.suffix != ".pt":
        alpha = json.loads(config.read_text(encoding="utf-8"))["lora_alpha"]
    return Adapter(state, rank, alpha, targets)


def load(model: PeftModel, adapter: Adapter, source: str) -> None:
    """Copy ``adapter`` into ``model``.

    Raises:
        ValueError: the adapter was made for another model; the message lists what differs.
    """
    own = parameters(model)
    mismatch = describe_mismatch(own, adapter.state)
    if mismatch:
        raise ValueError(f"the adapter {source} does not fit the model: {mismatch}")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(adapter.state[key])
