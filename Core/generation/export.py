"""A trained adapter in the forms other programs read, and as the hub shows it."""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize

from Core.backbones import BACKBONES, Backbone, ModelSettings
from Core.build import new_backbone
from Core.config import Config, load_config
from Core.config.files import read_file, read_run
from Core.generation.formats import FORMATS
from Core.generation.gains import Gain, find_results, read_gains
from Core.generation.jobs import fingerprint
from Core.generation.model_card import DIFFUSERS_WEIGHTS, model_card
from Core.generation.publish import refuse_name
from Core.modules import lora, lora_formats
from Core.utils.files import replacing_folder, write_whole

logger = logging.getLogger("vader")
NAMELESS = "owner/name"  # in the examples of a card whose repository is not known yet
# Where a run's settings lie above its adapters: beside adapter/, and above checkpoints/step_<n>/adapter/.
RUN_DEPTH = 3


def export(
    source: str,
    out: Path,
    form: str,
    config: str | None = None,
    with_base_adapters: bool = False,
    results: Path | None = None,
    name: str | None = None,
) -> list[Path]:
    """Write the adapter ``source`` to ``out``; returns the files and folders that were written.

    Args:
        source: an adapter in any format that ``lora_ckpt_path`` takes.
        form: ``peft`` a folder as PEFT saves it; ``safetensors`` one file, with alpha in its metadata; ``diffusers`` a
            folder for ``load_lora_weights``; ``comfyui`` and ``kohya`` one file each; ``merged`` the full weights of
            the adapted model; ``hub`` a folder with a model card, PEFT's files, and diffusers' where the family has
            them.
        config: config file naming the base model; by default that of the run ``source`` lies in, except for ``merged``.
        with_base_adapters: ``merged`` includes the config's ``base_adapters``.
        results: of ``hub``: file with what was measured; by default that of the run.
        name: of ``hub``: id (``owner/name``) under which the adapter will be known.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: nothing to read, something in the way, no fit, or a format that
            the model family does not have.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; choose another path or remove it")
    _refuse_options(out, form, config, with_base_adapters)
    if form != "hub" and (results or name):
        raise ValueError("--results and --push go with --format hub")
    if name:
        refuse_name(name)
    settings = read_file(config) if config else _settings_of_run(Path(source).expanduser())
    family = _family(form, settings)
    adapter = lora.read(source, family.original_names if family else lora.NOTHING)
    out.parent.mkdir(parents=True, exist_ok=True)
    written = [out]
    if form == "merged":
        write_merged(adapter, source, out, str(config), with_base_adapters)
    elif form == "peft":
        write_peft(adapter, out)
    elif form == "safetensors":
        write_file(adapter, out)
    elif form == "hub":
        described = load_config([config]) if config else Config.of(settings)
        write_for_hub(adapter, out, described, _gains(source, adapter, results), name)
    else:
        assert family  # _family has refused these formats without one
        written = write_for_others(adapter, out, form, family)
    if (merged := settings.get("base_adapters")) and not with_base_adapters:
        logger.info("base_adapters of its base are not included; load them beside it: %s", merged)
    return written


def _refuse_options(out: Path, form: str, config: str | None, with_base_adapters: bool) -> None:
    """Raise ValueError for options that do not go together."""
    if form == "merged" and config is None:
        raise ValueError("--format merged needs the base model: name its config file with --config")
    if with_base_adapters and form != "merged":
        raise ValueError(
            "--with-base-adapters goes with --format merged; other formats hold the adapter alone"
        )
    if form in ("comfyui", "kohya") and out.suffix != ".safetensors":
        raise ValueError(f"--format {form} writes one file: give a path that ends in .safetensors, not {out}")


def _settings_of_run(source: Path) -> Mapping[str, Any]:
    """The configuration of the run an adapter lies in; empty where it lies in none."""
    return _run_of(source)[1]


def _run_of(source: Path) -> tuple[Path | None, Mapping[str, Any]]:
    """The folder and the configuration of the run an adapter lies in."""
    for folder in source.absolute().parents[:RUN_DEPTH]:
        with contextlib.suppress(ValueError, OSError):  # another program's
            if settings := read_run(folder):
                return folder, settings
    return None, {}


def _gains(source: str, adapter: lora.Adapter, results: Path | None) -> list[Gain]:
    """What was measured of an adapter: in ``results``, or, where those of its run are of it, in them."""
    digest = fingerprint(adapter)
    if results:
        return read_gains(results, digest)
    path = Path(source).expanduser()
    run, _ = _run_of(path)
    found = find_results(run) if run else None
    try:
        # The quickstart compares what its run has written last.
        if run and found and (found.parent != run or path.absolute() == run / "adapter"):
            return read_gains(found, digest)
    except ValueError as error:
        logger.info("%s", error)
    logger.info("the card says that nothing was measured: `vader evaluate` measures, then export again")
    return []


def _family(form: str, settings: Mapping[str, Any]) -> type[Backbone] | None:
    """The model family of an adapter; None where nothing names it and ``form`` does without.

    Raises:
        ValueError: ``form`` needs one, or the family does not have it.
    """
    if not settings:
        if form in ("diffusers", "comfyui", "kohya", "hub"):
            raise ValueError(
                f"--format {form} depends on the model family, and no run's config.py lies above the adapter; name a "
                "config of the family with --config"
            )
        return None
    name = settings.get("backbone", ModelSettings().backbone)
    family = BACKBONES.resolve(name)
    lacking = {} if family.diffusers_component else {"diffusers": "diffusers loads no adapters of it"}
    if not family.original_names:
        lacking |= dict.fromkeys(("comfyui", "kohya"), "the original names of its layers are not known")
    if form in lacking:
        others = ", ".join(other for other in FORMATS if other not in lacking)
        raise ValueError(
            f"--format {form} does not exist for backbone={name!r}: {lacking[form]}; there are {others}"
        )
    return family


def write_file(adapter: lora.Adapter, out: Path) -> None:
    """One file, which ``lora_ckpt_path`` reads again with its scaling.

    Raises:
        ValueError: layers differ in alpha, which this format has one of.
    """
    if adapter.sizes["alphas"]:
        raise ValueError(
            "--format safetensors holds one alpha, and the adapter's layers have several; choose peft"
        )
    metadata = {"format": "pt", lora.ALPHA_NOTE: str(adapter.alpha)}
    write_whole(out, serialize(adapter.state, metadata=metadata))


def write_peft(adapter: lora.Adapter, out: Path) -> None:
    """``adapter_model.safetensors`` and ``adapter_config.json``."""
    with replacing_folder(out) as folder:
        _write_peft_files(adapter, folder)


def _write_peft_files(adapter: lora.Adapter, folder: Path) -> None:
    from peft import LoraConfig

    settings = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(adapter.targets),
        **lora.patterns(adapter.sizes["ranks"], adapter.sizes["alphas"]),
    )
    settings.inference_mode = True
    (folder / lora.WEIGHTS).write_bytes(serialize(adapter.state, metadata={"format": "pt"}))
    settings.save_pretrained(str(folder))


def write_for_hub(
    adapter: lora.Adapter, out: Path, config: Config, gains: list[Gain], name: str | None
) -> None:
    """A folder with PEFT's files, those that diffusers loads where it can, and a model card."""
    family = config.backbone
    loads = bool(family.diffusers_component)
    parts = lora_formats.by_expert(adapter.layers, family.experts) if loads else {}
    with replacing_folder(out) as folder:
        _write_peft_files(adapter, folder)
        for expert, layers in parts.items():
            _write_diffusers_file(layers, folder / expert, family)
        card = model_card(name or NAMELESS, config, {expert: expert for expert in parts}, gains)
        (folder / "README.md").write_text(card, encoding="utf-8")


def write_for_others(adapter: lora.Adapter, out: Path, form: str, family: type[Backbone]) -> list[Path]:
    """A folder for diffusers, or one file for ComfyUI or kohya's programs; one for each expert, named after it, where
    the denoiser holds several.

    Raises:
        FileExistsError: an expert's is there already.
    """
    parts = lora_formats.by_expert(adapter.layers, family.experts)
    outs = {expert: out.with_name(f"{out.stem}_{expert}{out.suffix}") if expert else out for expert in parts}
    if existing := [path for path in outs.values() if path.exists()]:
        raise FileExistsError(f"{existing[0]} exists already; choose another path or remove it")
    for expert, layers in parts.items():
        _write_for_others(layers, outs[expert], form, family)
    return list(outs.values())


def _write_for_others(layers: lora_formats.Layers, out: Path, form: str, family: type[Backbone]) -> None:
    if form == "diffusers":
        with replacing_folder(out) as folder:
            _write_diffusers_file(layers, folder, family)
        return
    write = lora_formats.to_comfyui if form == "comfyui" else lora_formats.to_kohya
    write_whole(out, serialize(write(layers, family.original_names), metadata={"format": "pt"}))


def _write_diffusers_file(layers: lora_formats.Layers, folder: Path, family: type[Backbone]) -> None:
    state, metadata = lora_formats.to_diffusers(layers, family.diffusers_component)
    folder.mkdir(exist_ok=True)
    (folder / DIFFUSERS_WEIGHTS).write_bytes(serialize(state, metadata=metadata))


def write_merged(
    adapter: lora.Adapter, source: str, out: Path, config_file: str, with_base_adapters: bool
) -> None:
    """The base model's layout with W + alpha / rank · B A in place of each adapted W, computed in float32."""
    flags = [] if with_base_adapters else ["--base-adapters", "[]"]
    config = load_config([config_file, *flags])
    exact: dict[str, Any] = {"dtype": "fp32", "base_quant": "none"}
    obeyed = {key: value for key, value in exact.items() if key in config.backbone.obeys}
    config = replace(config, models=replace(config.models, stream_blocks=False, **obeyed))
    backbone = new_backbone(config, torch.device("cpu"))
    with backbone.loading("the model", backbone.weights.keys() - set(backbone.text_weights)):
        backbone.load()
    model = lora.attach(backbone.denoiser, adapter.targets, **adapter.sizes)
    lora.load(model, adapter, source)
    with replacing_folder(out) as folder:
        model.merge_and_unload().save_pretrained(folder)
