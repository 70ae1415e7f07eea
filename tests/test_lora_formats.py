"""LoRA files of diffusers, ComfyUI and kohya: what other programs compute with what is written, and what is read."""

import json

import diffusers
import lora_twins
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as converters
from diffusers.loaders import single_file_model, single_file_utils
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from Core.modules import lora, lora_formats, lora_names
from Core.sampling.no_grad_steps import fused_adapter

PIPELINES = {
    "wan": diffusers.WanPipeline,
    "wan_image": diffusers.WanPipeline,
    "ltx": diffusers.LTXPipeline,
    "cogvideox": diffusers.CogVideoXPipeline,
}
ORIGINAL = list(lora_twins.ORIGINAL_NAMES)


def layers_of(model: PeftModel, folder) -> lora_formats.Layers:
    lora.save(model, folder / "saved")
    return lora.read(folder / "saved").layers


def write(layers: lora_formats.Layers, form: str, name: str, folder) -> str:
    """A file of another program's format."""
    metadata = {"format": "pt"}
    if form == "diffusers":
        state, metadata = lora_formats.to_diffusers(layers, "transformer")
    elif form == "comfyui":
        state = lora_formats.to_comfyui(layers, lora_twins.ORIGINAL_NAMES[name])
    else:
        state = lora_formats.to_kohya(layers, lora_twins.ORIGINAL_NAMES[name])
    save_file(state, folder / f"{form}.safetensors", metadata=metadata)
    return str(folder / f"{form}.safetensors")


def pipeline_with(name: str, **components):
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler")) | components
    return PIPELINES[name](transformer=lora_twins.denoiser(name), **parts)


def assert_same(name: str, one: nn.Module, other: nn.Module) -> None:
    expected = lora_twins.output(name, one)
    assert not torch.allclose(expected, lora_twins.output(name, lora_twins.denoiser(name)), atol=1e-2)
    torch.testing.assert_close(lora_twins.output(name, other), expected, rtol=1e-5, atol=1e-5)


# diffusers converts LTX's ComfyUI files by their prefix alone, and has no converter of kohya's for it.
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "diffusers") for name in PIPELINES),
        *((name, "comfyui") for name in ORIGINAL),
        ("wan", "kohya"),
        ("wan_image", "kohya"),
    ],
)
def test_a_pipeline_of_diffusers_loads_what_is_written(tmp_path, name, form):
    model = lora_twins.adapted(name)
    pipeline = pipeline_with(name)
    pipeline.load_lora_weights(write(layers_of(model, tmp_path), form, name, tmp_path))
    assert_same(name, model, pipeline.transformer)


def test_a_pipeline_loads_the_second_expert_of_wan(tmp_path):
    model = lora_twins.adapted("wan")
    pipeline = pipeline_with("wan", transformer_2=lora_twins.denoiser("wan"))
    file = write(layers_of(model, tmp_path), "diffusers", "wan", tmp_path)
    pipeline.load_lora_weights(file, load_into_transformer_2=True)
    assert_same("wan", model, pipeline.transformer_2)


def test_a_denoiser_whose_pipeline_takes_no_lora_loads_it_itself(tmp_path):
    model = lora_twins.adapted("hunyuan_video15")
    denoiser = lora_twins.denoiser("hunyuan_video15")
    file = write(layers_of(model, tmp_path), "diffusers", "", tmp_path)
    denoiser.load_lora_adapter(
        file, use_safetensors=True
    )  # without it, this method leaves the metadata unread
    assert_same("hunyuan_video15", model, denoiser)


@pytest.mark.parametrize("name", ORIGINAL)
@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya"])
def test_what_is_written_is_read_again(tmp_path, name, form):
    written = layers_of(lora_twins.adapted(name), tmp_path)
    assert (
        len({layer.rank for layer in written.values()})
        == len({layer.alpha for layer in written.values()})
        == 2
    )
    adapter = lora.read(write(written, form, name, tmp_path), lora_twins.ORIGINAL_NAMES[name])
    assert adapter.layers.keys() == written.keys()
    for key, layer in adapter.layers.items():
        torch.testing.assert_close(layer.delta(), written[key].delta())
        assert layer.rank == written[key].rank
        assert layer.alpha == (layer.rank if form == "comfyui" else written[key].alpha)


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya"])
def test_an_adapter_of_another_program_can_be_attached(tmp_path, form):
    model = lora_twins.adapted("wan")
    adapter = lora.read(write(layers_of(model, tmp_path), form, "wan", tmp_path), lora_names.WAN)
    again = lora.attach(lora_twins.denoiser("wan"), adapter.targets, **adapter.sizes)
    lora.load(again, adapter, "theirs")
    assert_same("wan", model, again)
    lora.save(again, tmp_path / "again")
    reread = lora.read(tmp_path / "again")
    assert (reread.sizes, reread.state.keys()) == (adapter.sizes, adapter.state.keys())
    assert_same(
        "wan", model, PeftModel.from_pretrained(lora_twins.denoiser("wan"), tmp_path / "again").eval()
    )


def test_what_diffusers_saves_is_read(tmp_path):
    """A pipeline's file has a prefix on its keys and settings, a model's own has none."""
    model = lora_twins.adapted("wan")
    layers = layers_of(model, tmp_path)
    denoiser = lora_twins.denoiser("wan")
    file = write(layers, "diffusers", "wan", tmp_path)
    denoiser.load_lora_adapter(file, adapter_name="default", use_safetensors=True)
    denoiser.save_lora_adapter(tmp_path / "model")
    settings = {
        k: list(v) if isinstance(v, set) else v for k, v in denoiser.peft_config["default"].to_dict().items()
    }
    diffusers.WanPipeline.save_lora_weights(
        tmp_path / "pipeline",
        transformer_lora_layers=get_peft_model_state_dict(denoiser, adapter_name="default"),
        transformer_lora_adapter_metadata=settings,
    )
    for folder in ("model", "pipeline"):
        read = lora.read(tmp_path / folder, lora_names.WAN).layers
        assert {name: (layer.rank, layer.alpha) for name, layer in read.items()} == {
            name: (layer.rank, layer.alpha) for name, layer in layers.items()
        }
        assert all(torch.equal(read[name].up, layer.up) for name, layer in layers.items())


def test_original_names_without_a_prefix_are_read(tmp_path):
    """As DiffSynth writes them."""
    layers = layers_of(lora_twins.adapted("wan"), tmp_path)
    state = lora_formats.to_comfyui(layers, lora_names.WAN)
    bare = {
        key.removeprefix("diffusion_model.").replace(".weight", ".default.weight"): v
        for key, v in state.items()
    }
    save_file(bare, tmp_path / "bare.safetensors")
    assert lora.read(tmp_path / "bare.safetensors", lora_names.WAN).layers.keys() == layers.keys()


def test_a_layer_named_by_a_number_is_told_from_others(tmp_path):
    """Without PEFT's settings: ``2`` names two kinds of layers of an image-to-video model of Wan."""
    model = lora_twins.adapted("wan_image", ["blocks.0.ffn.net.2"])
    save_file(dict(lora.parameters(model)), tmp_path / "adapter.safetensors")
    assert lora.read(tmp_path / "adapter.safetensors").targets == ("blocks.0.ffn.net.2",)


def test_files_without_alpha_scale_by_one(tmp_path):
    file = write(layers_of(lora_twins.adapted("ltx"), tmp_path), "diffusers", "ltx", tmp_path)
    save_file(load_file(file), file)
    assert {layer.alpha / layer.rank for layer in lora.read(file, lora_names.LTX).layers.values()} == {1}


def test_an_alpha_that_is_no_whole_number_becomes_one(tmp_path):
    layers = layers_of(lora_twins.adapted("wan"), tmp_path)
    halves = {name: lora_formats.LoraLayer(layer.down, layer.up, 0.5) for name, layer in layers.items()}
    adapter = lora.read(write(halves, "kohya", "wan", tmp_path), lora_names.WAN)
    for name, layer in adapter.layers.items():
        assert layer.alpha == layer.rank
        torch.testing.assert_close(layer.delta(), halves[name].delta())


# Names


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_tables_name_every_layer_once(name):
    names = lora_twins.ORIGINAL_NAMES[name]
    assert len(set(names.values())) == len(names)
    for module in lora_twins.adapted_layers(lora_twins.denoiser(name)):
        original = lora_names.to_original(module, names)
        assert lora_names.from_original(original, names) == module
        assert lora_names.from_flat(original.replace(".", "_"), names) == module


@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("wan_image", single_file_utils.convert_wan_transformer_to_diffusers),
        ("ltx", single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers),
    ],
)
def test_the_tables_agree_with_the_conversion_of_whole_checkpoints(name, convert):
    """The norms and modulations, too, which some files change as a whole."""
    names = lora_twins.ORIGINAL_NAMES[name]
    for key in lora_twins.denoiser(name).state_dict():
        module, end = key.rpartition(".")[::2] if key.endswith((".weight", ".bias")) else (key, "")
        original = lora_names.to_original(module, names) + (end and f".{end}")
        assert list(convert({original: torch.zeros(1)})) == [key]


def test_adapters_on_the_embedders_of_wan_are_converted_by_diffusers(tmp_path):
    """Those outside the blocks, too; its converter knows no LoRA of the patch embedding."""
    targets = [name for name in lora_twins.adapted_layers(lora_twins.denoiser("wan")) if "patch" not in name]
    layers = layers_of(lora_twins.adapted("wan", targets), tmp_path)
    converted = converters._convert_non_diffusers_wan_lora_to_diffusers(
        lora_formats.to_comfyui(layers, lora_names.WAN)
    )
    expected, _ = lora_formats.to_diffusers({k: v.folded() for k, v in layers.items()}, "transformer")
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], value) for key, value in expected.items())


# Convolutions


def test_convolutions_are_adapted(tmp_path):
    """Attached, sampled with, saved and read."""
    targets = [
        name for name in lora_twins.adapted_layers(lora_twins.denoiser("modelscope")) if "conv" in name
    ]
    kinds = {type(lora_twins.denoiser("modelscope").get_submodule(name)) for name in targets}
    assert kinds == {nn.Conv2d, nn.Conv3d}
    model = lora_twins.adapted("modelscope", targets)
    layers = layers_of(model, tmp_path)
    assert {layer.down.ndim for layer in layers.values()} == {4, 5}
    with fused_adapter(model):
        lean = lora_twins.output("modelscope", model)
    torch.testing.assert_close(lean, lora_twins.output("modelscope", model), rtol=1e-5, atol=1e-5)
    state, metadata = lora_formats.to_diffusers(layers, "unet")
    save_file(state, tmp_path / "unet.safetensors", metadata=metadata)
    adapter = lora.read(tmp_path / "unet.safetensors")
    again = lora.attach(lora_twins.denoiser("modelscope"), adapter.targets, **adapter.sizes)
    lora.load(again, adapter, "theirs")
    assert_same("modelscope", model, again)


def test_diffusers_loads_no_adapter_into_the_network_of_modelscope():
    """Once it does, the family can state its ``diffusers_component``."""
    assert not hasattr(diffusers.UNet3DConditionModel, "load_lora_adapter")


@pytest.mark.parametrize("name", ["CogVideoX", "HunyuanVideo15", "UNet3D"])
def test_no_original_names_are_known_where_the_docs_say_so(name):
    """Once diffusers converts from them, the family can have a table of names."""
    converted = [*single_file_model.SINGLE_FILE_LOADABLE_CLASSES, *vars(converters)]
    assert not any(name.lower() in known.lower().replace("_", "") for known in converted)
    assert any("hunyuan" in known.lower() for known in converted)


def test_dropout_of_a_convolution_thins_its_channels():
    model = lora_twins.adapted("modelscope", ["conv_in"], dropout=0.5)
    lora.set_dropout(model, True, 0, 0)
    layer = model.base_model.model.conv_in
    mask = layer.lora_dropout[lora.ADAPTER].mask.flatten()
    assert 0 < int((mask == 0).sum()) < 4
    x = torch.randn(1, 4, 8, 8)
    thinned = layer.base_layer(x) + layer.scaling[lora.ADAPTER] * layer.lora_B[lora.ADAPTER](
        layer.lora_A[lora.ADAPTER](x * mask[:, None, None])
    )
    torch.testing.assert_close(layer(x), thinned)


# Refusals


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", "DoRA"),
        ("diffusion_model.blocks.0.self_attn.q.lokr_w1", "LoKr"),
        ("diffusion_model.blocks.0.self_attn.q.hada_w1_a", "LoHa"),
        ("diffusion_model.blocks.0.self_attn.q.lora_mid.weight", "LoCon with a Tucker decomposition"),
        ("diffusion_model.blocks.0.self_attn.q.lora_B.bias", "trained biases"),
        ("text_encoder.layers.0.q.lora_A.weight", "an adapter of the text encoder"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused(tmp_path, key, kind):
    file = write(layers_of(lora_twins.adapted("wan"), tmp_path), "comfyui", "wan", tmp_path)
    save_file({**load_file(file), key: torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=f"holds {kind}, which is not supported: 1 keys such as '{key}'"):
        lora.read(file, lora_names.WAN)


@pytest.mark.parametrize("key", ["blocks.0.norm3.diff", "blocks.0.self_attn.q.diff_b", "blocks.0.diff_m"])
def test_changes_of_whole_tensors_are_for_the_base_alone(tmp_path, key):
    file = write(layers_of(lora_twins.adapted("wan"), tmp_path), "comfyui", "wan", tmp_path)
    save_file({**load_file(file), f"diffusion_model.{key}": torch.zeros(2)}, file)
    with pytest.raises(
        ValueError,
        match=f"changes of whole weights or biases: 1 keys such as .*{key}.*name it in base_adapters",
    ):
        lora.read(file, lora_names.WAN)


@pytest.mark.parametrize("change", ["half a pair", "another rank"])
def test_factors_that_make_no_pair_are_refused(tmp_path, change):
    file = write(layers_of(lora_twins.adapted("wan"), tmp_path), "comfyui", "wan", tmp_path)
    state = load_file(file)
    key = next(key for key in state if "lora_B" in key)
    state[key] = state[key][:, :1].contiguous()
    if change == "half a pair":
        del state[key]
    save_file(state, file)
    with pytest.raises(ValueError, match=r"is no LoRA adapter: it holds \d+ tensors, 20 of them lora_A"):
        lora.read(file, lora_names.WAN)


def test_a_file_of_two_denoisers_is_refused(tmp_path):
    file = write(layers_of(lora_twins.adapted("wan"), tmp_path), "diffusers", "wan", tmp_path)
    both = load_file(file)
    both |= {key.replace("transformer.", "transformer_2."): value.clone() for key, value in both.items()}
    save_file(both, file)
    with pytest.raises(
        ValueError, match="holds 40 keys beside one denoiser's adapter, such as 'transformer_2"
    ):
        lora.read(file, lora_names.WAN)


def test_a_layer_that_the_family_does_not_have_is_named(tmp_path):
    file = write(layers_of(lora_twins.adapted("ltx"), tmp_path), "kohya", "ltx", tmp_path)
    with pytest.raises(
        ValueError, match="names a layer 'transformer_blocks_.*', which the model family does not"
    ):
        lora.read(file, lora_names.WAN)


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_a_family_without_original_names_refuses_their_formats(tmp_path, form):
    file = write(layers_of(lora_twins.adapted("wan"), tmp_path), form, "wan", tmp_path)
    with pytest.raises(
        ValueError, match="goes by the original names of layers .*give a file of PEFT or diffusers"
    ):
        lora.read(file)


def test_a_layer_without_an_original_name_is_not_written():
    layer = lora_formats.LoraLayer(torch.zeros(1, 2), torch.zeros(2, 1), 1)
    with pytest.raises(ValueError, match="no original name is known of the layer 'blocks.0.new'"):
        lora_formats.to_comfyui({"blocks.0.new": layer}, lora_names.WAN)


def test_damaged_settings_inside_a_file_are_named(tmp_path):
    file = write(layers_of(lora_twins.adapted("wan"), tmp_path), "diffusers", "wan", tmp_path)
    save_file(load_file(file), file, metadata={lora_formats.METADATA: json.dumps({"r": 2})[:-1]})
    with pytest.raises(ValueError, match="diffusers.safetensors has metadata that are no JSON"):
        lora.read(file, lora_names.WAN)
