"""A trained adapter in the forms other programs read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from Core.build import new_backbone
from Core.config import load_config
from Core.modules import lora

FORMATS = ("peft", "safetensors", "merged")


def export(source: str, out: Path, form: str, config: str | None = None) -> None:
    """Write the adapter ``source`` to ``out``.

    Args:
        form: ``peft`` a folder as PEFT saves it; ``safetensors`` one file, with alpha in its metadata;
            ``merged`` the full weights of the adapted model.
        config: config file naming the base model; for ``merged`` alone.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: nothing to read, something in the way, or no fit.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; choose another path or remove it")
    if (form == "merged") != (config is not None):
        raise ValueError("--config names the base model and goes with --format merged, and only with it")
    adapter = lora.read(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    if config is not None:
        write_merged(adapter, source, out, config)
    elif form == "peft":
        write_peft(adapter, out)
    else:
        write_file(adapter, out)


def write_file(adapter: lora.Adapter, out: Path) -> None:
    """One file, which ``lora_ckpt_path`` reads again with its scaling."""
    metadata = {"format": "pt", lora.ALPHA_NOTE: str(adapter.alpha)}
    save_file(adapter.state, out, metadata=metadata)


def write_peft(adapter: lora.Adapter, out: Path) -> None:
    """``adapter_model.safetensors`` and ``adapter_config.json``."""
    out.mkdir()
    save_file(adapter.state, out / lora.WEIGHTS, metadata={"format": "pt"})
    from peft import LoraConfig

    settings = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets))
    settings.inference_mode = True
    settings.save_pretrained(str(out))


def write_merged(adapter: lora.Adapter, source: str, out: Path, config_file: str) -> None:
    """The base model's layout with W + alpha / rank · B A in place of each adapted W, computed in float32."""
    config = load_config([config_file])
    exact: dict[str, Any] = {"dtype": "fp32", "base_quant": "none"}
    obeyed = {key: value for key, value in exact.items() if key in config.backbone.obeys}
    config = replace(config, models=replace(config.models, **obeyed))
    backbone = new_backbone(config, torch.device("cpu"))
    with backbone.loading("the model", backbone.weights.keys() - set(backbone.text_weights)):
        backbone.load()
    model = lora.attach(backbone.denoiser, adapter.targets, rank=adapter.rank, alpha=adapter.alpha)
    lora.load(model, adapter, source)
    model.merge_and_unload().save_pretrained(out)
