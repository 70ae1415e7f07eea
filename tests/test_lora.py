"""Adapters: where they attach, what is trained, and files that PEFT and the reference read and write."""

import copy
import json

import golden_data
import pytest
import torch
import twins
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from Core.backbones.opensora import OpenSora
from Core.modules import lora
from opensora.models.stdit.stdit3 import STDiT3_XL_2

TARGETS = OpenSora.lora_targets
BASE = twins.stdit()


def attached(rank: int = 4, alpha: int = 8, trained: bool = True, **options) -> PeftModel:
    """The twin with an adapter, its output weights non-zero as after training."""
    model = copy.deepcopy(BASE).requires_grad_(False)
    model = lora.attach(model, TARGETS, rank=rank, alpha=alpha, **options)
    if trained:
        generator = torch.Generator().manual_seed(1)
        for key, parameter in lora.parameters(model).items():
            if "lora_B" in key:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def output(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 2, 4, 4, generator=generator)
    y = torch.randn(1, 1, 5, twins.TEXT_WIDTH, generator=generator)
    sizes = {key: torch.tensor([value]) for key, value in dict(fps=24.0, height=32.0, width=32.0).items()}
    return model(x, torch.tensor([500.0]), y, **sizes)


class Casts(TorchDispatchMode):
    """Dtype and shape of every cast's result."""

    def __init__(self, made: list):
        super().__init__()
        self.made = made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.made.append((out.dtype, out.shape))
        return out


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Equal outputs, but for the order in which equal numbers are summed."""
    torch.testing.assert_close(output(one), output(other), rtol=1e-5, atol=1e-5)


def test_adapter_of_the_full_model_has_the_keys_and_shapes_of_the_reference():
    with torch.device("meta"):
        model = lora.attach(STDiT3_XL_2(qk_norm=True), TARGETS, rank=16, alpha=8)
    shapes = {key: list(parameter.shape) for key, parameter in lora.parameters(model).items()}
    assert shapes == golden_data.shapes("lora_manifest")


def test_only_the_adapter_is_trained_and_a_new_one_changes_nothing():
    model = attached(trained=False)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in lora.parameters(model).values()}
    assert not any(module.training for module in model.modules())
    assert_same(model, BASE)
    assert not torch.allclose(output(attached()), output(BASE), atol=1e-2)


def test_the_start_depends_on_the_seed_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = lora.parameters(attached(trained=False, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    again = lora.parameters(attached(trained=False, seed=1))
    other = lora.parameters(attached(trained=False, seed=2))
    downs = [key for key in first if "lora_A" in key]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in downs)


def test_autocast_gets_a_layer_s_input_as_it_is():
    """PEFT copies it to float32, which autocast undoes: the same bits, and no copy is made, let alone kept."""
    ours = lora.attach(torch.nn.Sequential(torch.nn.Linear(8, 8)).bfloat16(), ["0"], rank=2, alpha=2)
    theirs = copy.deepcopy(ours)
    del theirs.base_model.model[0]._cast_input_dtype
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    outcomes = []
    for model in (ours, theirs):
        made = []
        with torch.autocast("cpu", torch.bfloat16), Casts(made):
            out = model(x)
        outcomes.append((made.count((torch.float32, x.shape)), out, *torch.autograd.grad(out.sum(), x)))
    (copies, *one), (copies_of_peft, *other) = outcomes
    assert (copies, copies_of_peft) == (0, 1)
    assert all(map(torch.equal, one, other))
    assert ours(x).dtype == torch.bfloat16  # without autocast, where the copy is needed


def test_adapters_of_half_precision_models_are_float32():
    model = lora.attach(copy.deepcopy(BASE).bfloat16(), TARGETS, rank=2, alpha=2)
    assert {p.dtype for p in lora.parameters(model).values()} == {torch.float32}


def test_saving_and_loading_again_changes_nothing(tmp_path):
    model = attached(rank=3, alpha=5)
    lora.save(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    adapter = lora.read(tmp_path / "adapter")
    assert (adapter.rank, adapter.alpha, adapter.targets) == (3, 5, tuple(sorted(TARGETS)))
    again = attached(rank=adapter.rank, alpha=adapter.alpha, trained=False)
    lora.load(again, adapter, "adapter")
    assert_same(again, model)


def test_targets_longer_than_a_layers_name_are_read(tmp_path):
    """`proj` alone is the name of a layer in each kind of attention."""
    model = lora.attach(copy.deepcopy(BASE), ["cross_attn.proj"], rank=2, alpha=2)
    lora.save(model, tmp_path / "adapter")
    adapter = lora.read(tmp_path / "adapter")
    again = lora.attach(copy.deepcopy(BASE), adapter.targets, rank=adapter.rank, alpha=adapter.alpha)
    lora.load(again, adapter, "adapter")
    assert lora.parameters(again).keys() == lora.parameters(model).keys()


def test_peft_reads_what_is_saved(tmp_path):
    model = attached(rank=3, alpha=5)
    lora.save(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "adapter").eval()
    assert_same(again, model)


def test_what_peft_saves_is_read(tmp_path):
    model = attached(rank=3, alpha=5)
    model.save_pretrained(tmp_path)
    adapter = lora.read(tmp_path)
    assert (adapter.rank, adapter.alpha) == (3, 5)
    assert adapter.state.keys() == lora.parameters(model).keys()


def test_one_safetensors_file_is_read(tmp_path):
    """Without an adapter_config.json beside it, alpha is that of the reference."""
    save_file(dict(lora.parameters(attached())), tmp_path / "exported.safetensors")
    adapter = lora.read(tmp_path / "exported.safetensors")
    assert (adapter.rank, adapter.alpha) == (4, 8)


@pytest.mark.parametrize("name", ["peft_model_100.pt", ""], ids=["file", "folder"])
def test_an_adapter_of_the_reference_loads(tmp_path, name):
    model = attached(rank=16, alpha=8)
    torch.save(
        {key: p.detach().half() for key, p in lora.parameters(model).items()}, tmp_path / "peft_model_100.pt"
    )
    adapter = lora.read(tmp_path / name)
    assert (adapter.rank, adapter.alpha, adapter.targets) == (16, 8, tuple(sorted(TARGETS)))
    again = attached(rank=16, alpha=8, trained=False)
    lora.load(again, adapter, "reference")
    torch.testing.assert_close(output(again), output(model), rtol=1e-2, atol=1e-3)


def test_keys_that_name_the_adapter_are_read(tmp_path):
    model = attached()
    named = {key.replace(".weight", ".default.weight"): p for key, p in lora.parameters(model).items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    assert lora.read(tmp_path).state.keys() == lora.parameters(model).keys()


def test_a_target_that_matches_no_layer_names_those_there_are():
    with pytest.raises(ValueError) as error:
        lora.attach(copy.deepcopy(BASE), ["qkv", "to_q"], rank=2, alpha=2)
    assert str(error.value).startswith(
        "lora_targets: no layer that can be adapted is named 'to_q'; there are "
    )
    assert all(target in str(error.value) for target in TARGETS)


def test_the_end_of_a_name_is_no_match():
    """`linear` ends `q_linear` but is not a layer of that name."""
    with pytest.raises(ValueError, match="no layer that can be adapted is named 'kv'"):
        lora.attach(copy.deepcopy(BASE), ["kv"], rank=2, alpha=2)


def test_an_adapter_of_another_rank_or_layer_is_refused(tmp_path):
    lora.save(attached(rank=2), tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="the adapter mine does not fit the model: 24 of another shape: .*more"
    ):
        lora.load(attached(rank=4), lora.read(tmp_path / "adapter"), "mine")
    narrow = lora.attach(copy.deepcopy(BASE), ["qkv"], rank=2, alpha=2)
    with pytest.raises(ValueError, match="16 unexpected: .*cross_attn"):
        lora.load(narrow, lora.read(tmp_path / "adapter"), "mine")


@pytest.mark.parametrize("change", ["whole model", "half of a pair"])
def test_what_is_no_adapter_is_refused(tmp_path, change):
    state = dict(lora.parameters(attached()))
    if change == "whole model":
        state = BASE.state_dict()
    else:
        state.popitem()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is no LoRA adapter: it holds"):
        lora.read(tmp_path)


def test_nothing_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter at .*found 0 weight files"):
        lora.read(tmp_path)


def test_strength_scales_the_adapters_share():
    """The adapted layer is linear in the strength; 0 is the model without an adapter."""
    model = attached()
    layer = model.base_model.model.spatial_blocks[0].attn.qkv
    x = torch.randn(1, 3, twins.STDIT["hidden_size"])
    full, plain = layer(x), layer.base_layer(x)
    lora.set_scale(model, 0.5)
    torch.testing.assert_close(layer(x), plain + (full - plain) / 2)
    lora.set_scale(model, 0)
    assert_same(model, BASE)
    lora.set_scale(model, 1)
    torch.testing.assert_close(layer(x), full)


def test_dropout_is_active_only_when_switched_on_and_drawn_by_step():
    model = attached(dropout=0.5)
    still = output(model)
    lora.set_dropout(model, True, 200, 1)
    first = output(model)
    assert torch.equal(output(model), first) and not torch.allclose(first, still, atol=1e-3)
    assert not any(module.training for name, module in model.named_modules() if "lora_dropout" not in name)
    lora.set_dropout(model, True, 200, 2)
    assert not torch.allclose(output(model), first, atol=1e-3)
    lora.set_dropout(model, True, 200, 1)
    assert torch.equal(output(model), first)
    lora.set_dropout(model, False)
    assert torch.equal(output(model), still)


def test_saving_over_an_adapter_replaces_it_whole(tmp_path):
    lora.save(attached(rank=2), tmp_path / "adapter")
    lora.save(attached(rank=3), tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3
    assert {value.shape[0] for key, value in state.items() if "lora_A" in key} == {3}


@pytest.mark.parametrize(
    "variant",
    [
        dict(use_rslora=True),
        dict(use_dora=True),
        dict(bias="lora_only"),
    ],
    ids=lambda variant: next(iter(variant)),
)
def test_what_is_more_than_plain_lora_is_refused(tmp_path, variant):
    """Read as plain LoRA, each would be another function than the one that was trained."""
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), **variant)
    get_peft_model(copy.deepcopy(BASE), settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"was made with {next(iter(variant))}=.*which is not supported"):
        lora.read(tmp_path)


def test_layers_of_another_rank_or_alpha_are_read(tmp_path):
    """PEFT's patterns are regular expressions that match the end of a name."""
    patterns = dict(rank_pattern={"spatial_blocks.0.attn.qkv": 6}, alpha_pattern={r"temporal_blocks\.1.*": 2})
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), **patterns)
    model = get_peft_model(copy.deepcopy(BASE), settings).eval()
    for parameter in lora.parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    adapter = lora.read(tmp_path)
    assert (adapter.rank, adapter.alpha) == (4, 8)
    assert {layer.rank for layer in adapter.layers.values()} == {4, 6}
    again = lora.attach(copy.deepcopy(BASE), adapter.targets, **adapter.sizes)
    lora.load(again, adapter, "theirs")
    assert_same(again, model)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_named(tmp_path, name):
    lora.save(attached(), tmp_path / "adapter")
    file = tmp_path / "adapter" / name
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{name}.* damaged"):
        lora.read(tmp_path / "adapter")
