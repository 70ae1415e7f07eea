"""Adapters merged into the frozen base, and training that continues from adapters of other programs."""

import shutil
import sys
from pathlib import Path

import lora_twins
import pytest
import sampling_runs
import torch
import twin_runs
import twins
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from Core.backbones.opensora import OpenSora
from Core.build import new_backbone
from Core.config import load_config
from Core.generation.export import write_for_others
from Core.generation.manifest import read_manifest
from Core.modules import base_adapters, lora, lora_formats, lora_names

ROOT = Path(__file__).resolve().parents[1]
# One frame in two steps is enough for everything but the quality of a picture.
SMALL = dict(num_frames=1, decode_frame=0, scheduler=sampling_runs.SCHEDULER)


@pytest.fixture(scope="module")
def style(tmp_path_factory) -> str:
    """Somebody else's adapter, as a file of diffusers, whose layers differ in rank and alpha."""
    folder = tmp_path_factory.mktemp("style")
    targets = [f"spatial_blocks.{i}.cross_attn.q_linear" for i in (0, 1)]
    torch.manual_seed(3)
    model = lora.attach(
        twins.stdit(), targets, rank=2, alpha=2, ranks={targets[1]: 3}, alphas={targets[1]: 1}
    )
    for parameter in lora.parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    lora.save(model, folder / "saved")
    state, metadata = lora_formats.to_diffusers(lora.read(folder / "saved").layers, "transformer")
    save_file(state, folder / "style.safetensors", metadata=metadata)
    return str(folder / "style.safetensors")


# Merging


@pytest.mark.parametrize("name", ["wan", "modelscope"])
def test_merged_adapters_add_up_by_their_strengths(tmp_path, name):
    """One of them on convolutions, too, where the denoiser has such."""
    outside = [
        layer for layer in lora_twins.adapted_layers(lora_twins.denoiser(name)) if "blocks." not in layer
    ]
    models = [lora_twins.adapted(name), lora_twins.adapted(name, outside)]
    merged = lora_twins.denoiser(name)
    for number, model in enumerate(models):
        lora.save(model, tmp_path / str(number))
    entries = [str(tmp_path / "0"), {"path": str(tmp_path / "1"), "strength": -0.5}]
    base_adapters.merge(merged, entries)
    lora.set_scale(models[1], -0.5)
    expected = [model.merge_and_unload().state_dict() for model in models]
    before = lora_twins.denoiser(name).state_dict()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[0][key] + expected[1][key] - before[key])


def test_an_adapter_is_merged_into_its_expert(tmp_path):
    lora.save(lora_twins.adapted("wan"), tmp_path / "adapter")
    model = torch.nn.ModuleDict({name: lora_twins.denoiser("wan") for name in ("high_noise", "low_noise")})
    base_adapters.merge(model, [dict(path=str(tmp_path / "adapter"), expert="low_noise")])
    alone = lora_twins.denoiser("wan")
    for expert, entries in (("high_noise", []), ("low_noise", [str(tmp_path / "adapter")])):
        base_adapters.merge(alone, entries)
        merged = model[expert].state_dict()
        assert all(torch.equal(merged[key], value) for key, value in alone.state_dict().items())


DIFFERENCES = {
    # key of a file → the tensor it changes
    "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
    "blocks.1.ffn.0.diff_b": "blocks.1.ffn.net.0.proj.bias",
    "blocks.0.norm3.diff": "blocks.0.norm2.weight",
    "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
    "blocks.1.cross_attn.norm_k.diff": "blocks.1.attn2.norm_k.weight",
    "patch_embedding.diff": "patch_embedding.weight",
    "blocks.0.self_attn.k.diff": "blocks.0.attn1.to_k.weight",
    "blocks.0.diff_m": "blocks.0.scale_shift_table",
    "blocks.1.modulation.diff": "blocks.1.scale_shift_table",
    "head.diff_m": "scale_shift_table",
}


def with_differences(folder: Path, form: str, changed=DIFFERENCES):
    """A file of an adapter with changes of whole tensors; the model with the adapter; the changes."""
    model = lora_twins.adapted("wan")
    lora.save(model, folder / "plain")
    layers = lora.read(folder / "plain").layers
    state = getattr(lora_formats, f"to_{form}")(layers, lora_names.WAN)
    own, generator = lora_twins.denoiser("wan").state_dict(), torch.Generator().manual_seed(4)
    changes = {}
    for key, name in changed.items():
        changes[name] = 0.3 * torch.randn(own[name].shape, generator=generator)
        stem, _, kind = key.rpartition(".")
        flat = "lora_unet_" + stem.replace(".", "_")
        state[f"{flat if form == 'kohya' else f'diffusion_model.{stem}'}.{kind}"] = changes[name]
    save_file(state, folder / "distilled.safetensors")
    return str(folder / "distilled.safetensors"), model, changes


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_changes_of_whole_tensors_are_added(tmp_path, form):
    file, model, changes = with_differences(tmp_path, form)
    merged, before = lora_twins.denoiser("wan"), lora_twins.denoiser("wan").state_dict()
    base_adapters.merge(merged, [dict(path=file, strength=0.5)], lora_names.WAN)
    lora.set_scale(model, 0.5)
    expected = model.merge_and_unload().state_dict()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[key] + 0.5 * changes.get(key, torch.zeros(())))
    assert all(not torch.equal(merged.state_dict()[key], before[key]) for key in changes)


def test_a_step_distillation_makes_what_it_makes_in_diffusers(tmp_path):
    """diffusers' converter takes biases for those of LoRA, which all layers then have, and leaves out the norms."""
    layers = [name for name in lora_twins.adapted_layers(lora_twins.denoiser("wan")) if "blocks." in name]
    biases = {f"{lora_names.to_original(name, lora_names.WAN)}.diff_b": f"{name}.bias" for name in layers}
    file, _, _ = with_differences(tmp_path, "comfyui", biases)
    merged = lora_twins.denoiser("wan")
    base_adapters.merge(merged, [file], lora_names.WAN)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = WanPipeline(transformer=lora_twins.denoiser("wan"), **parts)
    pipeline.load_lora_weights(file)
    theirs = lora_twins.output("wan", pipeline.transformer)
    torch.testing.assert_close(lora_twins.output("wan", merged), theirs, rtol=1e-5, atol=1e-5)


def test_changes_of_tensors_that_are_not_there_are_refused(tmp_path):
    state = {
        "diffusion_model.blocks.0.norm2.diff": torch.zeros(24),
        "diffusion_model.head.diff_m": torch.zeros(2),
    }
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError,
        match=r"unexpected: blocks.0.norm3.weight; 1 of another shape: scale_shift_table \(2,\) instead",
    ):
        base_adapters.merge(lora_twins.denoiser("wan"), [str(tmp_path / "other.safetensors")], lora_names.WAN)


def test_half_precision_is_rounded_once(tmp_path):
    lora.save(lora_twins.adapted("wan"), tmp_path / "adapter")
    exact, half = lora_twins.denoiser("wan").bfloat16().float(), lora_twins.denoiser("wan").bfloat16()
    for model in (exact, half):
        base_adapters.merge(model, [str(tmp_path / "adapter")])
    assert all(
        torch.equal(half.state_dict()[key], value.bfloat16()) for key, value in exact.state_dict().items()
    )


def loaded(twin: Path, folder: Path, **overrides) -> dict[str, torch.Tensor]:
    """The denoiser's weights as a run would use them."""
    values = twins.settings(twin, folder / "run", **overrides)
    config = load_config([str(twins.config_file(folder / "config.py", values))])
    backbone = new_backbone(config, torch.device("cpu"))
    backbone.load()
    return backbone.denoiser.state_dict()


@pytest.mark.parametrize(
    "storage", [dict(), dict(dtype="bf16"), dict(dtype="fp8"), dict(base_quant="nf4")], ids=str
)
def test_what_is_stored_is_the_sum(twin, tmp_path, style, storage):
    merged = twins.stdit()
    merged.load_state_dict(load_file(twin / "stdit" / "model.safetensors"))
    base_adapters.merge(merged, [style])
    merged.save_pretrained(tmp_path / "merged")
    model = dict(type="STDiT3-XL/2", from_pretrained=str(tmp_path / "merged"))
    expected = loaded(twin, tmp_path, model=model, **storage)
    state = loaded(twin, tmp_path, base_adapters=[style], **storage)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_an_adapter_of_another_model_is_refused(tmp_path):
    lora.save(lora_twins.adapted("ltx"), tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="base_adapters: the adapter .* does not fit the model: .* unexpected: transfo"
    ):
        base_adapters.merge(lora_twins.denoiser("wan"), [str(tmp_path / "adapter")])
    narrow = lora_twins.wan(ffn_dim=16)
    lora.save(lora_twins.adapted("wan"), tmp_path / "adapter")
    with pytest.raises(ValueError, match="4 of another shape: blocks.0.ffn.net.0.proj"):
        base_adapters.merge(narrow, [str(tmp_path / "adapter")])


def test_faulty_entries_are_reported_together(tmp_path, twin, capsys):
    (tmp_path / "empty").mkdir()
    entries = [
        "gone",
        {"strength": 0.5},
        {"path": "gone", "strength": "strong", "scale": 1},
        str(tmp_path / "empty"),
    ]
    assert twin_runs.start(twin, tmp_path / "run", base_adapters=entries) == 2
    said = capsys.readouterr().err
    for sentence in (
        "base_adapters[0]: there is no file or folder 'gone'",
        "base_adapters[1] has no path; give dict(path=…, strength=1.0) or the path alone",
        "base_adapters[2].strength must be a number, got 'strong'",
        "unknown key 'base_adapters[2].scale'",
        "base_adapters[3]: no adapter at",
    ):
        assert sentence in said


# Runs


@pytest.fixture(scope="module")
def run(twin, tmp_path_factory, style) -> Path:
    """A run of one step from an adapter of diffusers, on a base with two merged, the second kept beside the run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    second = shutil.copy(style, folder.with_name("second.safetensors"))
    assert twin_runs.start(twin, folder, **on_base(style, second)) == 0
    return folder


def on_base(style: str, second: str | Path) -> dict:
    merged = [style, dict(path=str(second), strength=-0.25)]
    return continued(style) | dict(base_adapters=merged)


def continued(style: str) -> dict:
    return SMALL | dict(lora_ckpt_path=style, lora_rank=2, lora_alpha=2, max_train_steps=1)


def changed(file: Path) -> None:
    """Another adapter in the place of one."""
    metadata = {lora_formats.METADATA: '{"lora_alpha": 1}'}
    save_file({key: value * 2 for key, value in load_file(file).items()}, file, metadata=metadata)


def test_a_run_is_resumed_on_the_same_base_alone(run, twin, style, tmp_path, capsys):
    second = run.with_name("second.safetensors")
    trainer = twin_runs.built_trainer(twin, run, **on_base(style, second))
    assert trainer.step == 1
    lora.save(trainer.backbone.denoiser, tmp_path / "resumed")
    one, other = lora.read(tmp_path / "resumed"), lora.read(run / "adapter")
    assert one.sizes == other.sizes == lora.read(style).sizes
    assert all(torch.equal(one.state[key], other.state[key]) for key in one.state)
    assert twin_runs.start(twin, run, **continued(style)) == 2
    assert "base_adapters was" in capsys.readouterr().err
    kept = second.read_bytes()
    changed(second)
    assert twin_runs.start(twin, run, **on_base(style, second)) == 2
    assert "content of base_adapters was" in capsys.readouterr().err
    second.write_bytes(kept)


def test_videos_are_made_again_on_another_base(twin, style, tmp_path):
    other = Path(shutil.copy(style, tmp_path / "other.safetensors"))
    seen = []
    for entries in ([], [str(other)], [str(other)], "changed"):
        if entries == "changed":
            changed(other)
            entries = [str(other)]
        assert sampling_runs.sample(twin, tmp_path / "run", base_adapters=entries, end_index=1) == 0
        seen.append(next(iter(sampling_runs.contents(tmp_path / "run").values())))
    assert seen[1] == seen[2] and len(set(seen)) == 3
    assert read_manifest(tmp_path / "run")[0]["base_adapters"] == [str(other)]


def export(*arguments) -> int:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from export_adapter import main as run_export
    finally:
        sys.path.pop(0)
    return run_export([str(argument) for argument in arguments])


def test_a_merged_export_includes_the_base_adapters_only_if_asked(run, style, tmp_path, caplog):
    caplog.set_level("INFO")
    config = run.with_suffix(".config.py")
    for name, flags in (("without", []), ("with", ["--with-base-adapters"])):
        assert export(run / "adapter", tmp_path / name, "--format", "merged", "--config", config, *flags) == 0
    assert caplog.text.count("base_adapters of its base are not included; load them beside it: [") == 1
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("without", "with"))
    expected = twins.stdit()
    expected.load_state_dict(one)
    base_adapters.merge(expected, [style, {"path": style, "strength": -0.25}])
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-5)


# Adapters of other programs in lora_ckpt_path


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya"])
def test_training_continues_from_an_adapter_of_another_program(twin, style, tmp_path, form, monkeypatch):
    layers = lora.read(style).layers
    names = {"spatial_blocks.{}.cross_attn.q_linear": "blocks.{}.attn.q"}
    monkeypatch.setattr(OpenSora, "original_names", names)
    file = tmp_path / "theirs.safetensors"
    if form == "diffusers":
        shutil.copy(style, file)
    else:
        save_file(
            (lora_formats.to_comfyui if form == "comfyui" else lora_formats.to_kohya)(layers, names), file
        )
    adapter = lora.read(file, names)
    sizes = dict(lora_rank=adapter.rank, lora_alpha=adapter.alpha)
    trainer = twin_runs.built_trainer(twin, tmp_path / "run", lora_ckpt_path=str(file), **sizes)
    lora.save(trainer.backbone.denoiser, tmp_path / "start")
    start = lora.read(tmp_path / "start")
    assert start.sizes == adapter.sizes and start.layers.keys() == layers.keys()
    for name, layer in start.layers.items():
        torch.testing.assert_close(layer.delta(), layers[name].delta())
    assert trainer.train_step().grad_norm > 0


# Exports


def test_exports_for_other_programs_follow_the_family_of_the_run(run, tmp_path, monkeypatch, capsys):
    source = run / "checkpoints" / "step_000001" / "adapter"
    for form in ("diffusers", "comfyui", "kohya"):
        assert export(source, tmp_path / f"{form}.safetensors", "--format", form) == 2
        said = capsys.readouterr().err
        assert f"--format {form} does not exist for backbone='opensora'" in said
        assert "there are peft, safetensors, merged" in said
    kinds = ("spatial", "temporal")
    layers = ("attn.qkv", "cross_attn.q_linear", "cross_attn.kv_linear")
    names = {f"{kind}_blocks.{{}}.{layer}": f"{kind}.{{}}.{layer}" for kind in kinds for layer in layers}
    monkeypatch.setattr(OpenSora, "original_names", names)
    monkeypatch.setattr(OpenSora, "diffusers_component", "transformer")
    trained = lora.read(source)
    for form, out in (("diffusers", "folder"), ("comfyui", "c.safetensors"), ("kohya", "k.safetensors")):
        assert export(source, tmp_path / out, "--format", form) == 0
        read = lora.read(tmp_path / out, names).layers
        for name, layer in trained.layers.items():
            torch.testing.assert_close(read[name].delta(), layer.delta())
    assert (tmp_path / "folder" / "pytorch_lora_weights.safetensors").is_file()
    config = run.with_suffix(".config.py")
    assert export(tmp_path / "k.safetensors", tmp_path / "peft", "--config", config) == 0
    assert lora.read(tmp_path / "peft").sizes == trained.sizes


@pytest.mark.parametrize(
    ("form", "out", "files"),
    [
        ("diffusers", "mine", [f"mine_{e}_noise/pytorch_lora_weights.safetensors" for e in ("high", "low")]),
        ("comfyui", "mine.safetensors", [f"mine_{e}_noise.safetensors" for e in ("high", "low")]),
    ],
)
def test_each_expert_has_a_file(tmp_path, form, out, files):
    class Family:
        original_names, diffusers_component = lora_names.WAN, "transformer"
        experts = ("high_noise", "low_noise")

    lora.save(lora_twins.adapted("wan"), tmp_path / "one")
    layers = lora.read(tmp_path / "one").layers
    both = {f"{expert}.{name}": layer for expert in Family.experts for name, layer in layers.items()}
    write_for_others(lora.Adapter(both, ()), tmp_path / out, form, Family)
    for file in files:
        assert lora.read(tmp_path / file, lora_names.WAN).layers.keys() == layers.keys()
    with pytest.raises(FileExistsError, match="mine_high_noise.* exists already"):
        write_for_others(lora.Adapter(both, ()), tmp_path / out, form, Family)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--format", "comfyui"], "ends in .safetensors"),
        (["--format", "diffusers"], "no run's config.py lies above the adapter"),
        (["--with-base-adapters"], "--with-base-adapters goes with --format merged"),
        (["--format", "safetensors"], "holds one alpha, and the adapter's layers have several"),
    ],
    ids=["suffix", "family", "base", "alpha"],
)
def test_exports_that_cannot_be_are_refused(style, tmp_path, capsys, flags, sentence):
    assert export(style, tmp_path / "out", *flags) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
