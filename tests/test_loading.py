"""Weights on disk: every layout that loads, and a sentence for every one that does not."""

import json
import pickle

import pytest
import torch
import twins
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from opensora.models.stdit.stdit3 import STDiT3
from opensora.models.vae import vae as vae_module
from opensora.models.vae.vae import OpenSoraVAE_V1_2
from opensora.registry import MODELS, build_module
from opensora.utils import ckpt_utils

ENTRY = dict(type="STDiT3-XL/2", **twins.STDIT)
# What stands beside the sizes in the released checkpoints' config.json.
HUB_EXTRAS = dict(
    architectures=["STDiT3"],
    drop_path=0.0,
    enable_sequence_parallelism=False,
    freeze_y_embedder=True,
    model_type="STDiT3",
    only_train_temporal=False,
    skip_y_embedder=False,
    torch_dtype="float32",
    transformers_version="4.36.2",
)


@pytest.fixture(scope="module")
def original() -> STDiT3:
    return twins.stdit(seed=3)


@pytest.fixture(scope="module")
def state(original) -> dict[str, torch.Tensor]:
    return original.state_dict()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Local files must never cause a call to the hub."""

    def refuse(*_, **__):
        raise AssertionError("the hub was asked for a local file")

    monkeypatch.setattr(ckpt_utils, "snapshot_download", refuse)


def load(source, **changes) -> STDiT3:
    return build_module({**ENTRY, "from_pretrained": str(source), **changes}, MODELS)


def assert_loaded(model: STDiT3, state: dict[str, torch.Tensor]) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert not model.training


def test_a_folder_in_the_hub_layout_brings_its_own_sizes(tmp_path, original, state):
    original.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **HUB_EXTRAS}))
    model = build_module(dict(type="STDiT3-XL/2", from_pretrained=str(tmp_path), qk_norm=True), MODELS)
    assert_loaded(model, state)
    assert model.config.depth == twins.STDIT["depth"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "other.safetensors"]
)
def test_a_folder_under_each_file_name(tmp_path, state, name):
    save_file(state, tmp_path / name)
    assert_loaded(load(tmp_path), state)


def test_one_safetensors_file(tmp_path, state):
    save_file(state, tmp_path / "weights.safetensors")
    assert_loaded(load(tmp_path / "weights.safetensors"), state)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_state_dict_of_torch(tmp_path, state, wrapper):
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "weights.pt")
    assert_loaded(load(tmp_path / "weights.pt"), state)
    assert_loaded(load(tmp_path), state)


@pytest.fixture
def shards(tmp_path, state):
    """A folder whose weights are spread over three files."""
    keys = sorted(state)
    names = {f"model-0000{i + 1}-of-00003.safetensors": keys[i::3] for i in range(3)}
    for name, part in names.items():
        save_file({key: state[key] for key in part}, tmp_path / name)
    index = {"weight_map": {key: name for name, part in names.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_sharded_safetensors(shards, state):
    assert_loaded(load(shards), state)


def test_a_missing_shard_is_named(shards):
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="model-00002-of-00003.safetensors is named by its index but missing"
    ):
        load(shards)


class Intruder:
    """Unpickling it makes a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path, state, save):
    save({"state_dict": state, "extra": Intruder(tmp_path / "trace")}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights.pt .*could run code.*give a .safetensors file"):
        load(tmp_path / "weights.pt")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"], ids=["empty", "page"])
def test_a_file_that_is_no_weight_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load(tmp_path / name)


def test_a_download_that_was_cut_off(tmp_path, state):
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors is damaged.*; fetch it again"):
        load(tmp_path)


def test_a_file_without_a_state_dict(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "weights.pt")
    with pytest.raises(
        ValueError, match="holds a list without tensors by name; give a file with a state dict"
    ):
        load(tmp_path / "weights.pt")


def test_all_keys_that_do_not_fit_are_listed(tmp_path, state):
    changed = {key: value for key, value in state.items() if key != "t_block.1.bias"}
    changed |= {"ema.decay": torch.ones(1), "final_layer.linear.bias": torch.ones(7)}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    message = str(error.value)
    assert "do not fit STDiT3" in message and str(tmp_path) in message
    assert "1 missing: t_block.1.bias" in message
    assert "1 unexpected: ema.decay" in message
    assert "1 of another shape: final_layer.linear.bias (7,) instead of (32,)" in message


def test_a_long_list_of_keys_is_cut(tmp_path, state):
    save_file({"x_embedder.proj.bias": state["x_embedder.proj.bias"]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"… \({len(state) - 1 - 5} more\)"):
        load(tmp_path)


def test_folders_without_or_with_too_many_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights in .*: expected model.safetensors.*, found none"):
        load(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="found 2 candidates"):
        load(tmp_path)


def test_a_path_that_does_not_exist():
    with pytest.raises(
        FileNotFoundError, match="./none/here is no file or folder here; give an existing path or"
    ):
        load("./none/here")


def test_unknown_keys_of_the_entry_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown keys in `model`: dept; allowed: input_size"):
        load(tmp_path, dept=2)
    with pytest.raises(ValueError, match="enable_sequence_parallelism=True is not supported"):
        load(tmp_path, enable_sequence_parallelism=True)


def hub(calls: list[bool], cached=None):
    """A stand-in for the hub client on a machine without network; it notes whether it was to stay local."""

    def snapshot_download(repo_id: str, *, local_files_only: bool, allow_patterns: list[str]) -> str:
        calls.append(local_files_only)
        if cached is None:
            raise LocalEntryNotFoundError("cannot reach the hub")
        return str(cached)

    return snapshot_download


def test_a_cached_hub_id_loads_without_network(tmp_path, original, state, monkeypatch):
    original.save_pretrained(tmp_path)
    calls: list[bool] = []
    monkeypatch.setattr(ckpt_utils, "snapshot_download", hub(calls, tmp_path))
    assert_loaded(load("organisation/model"), state)
    assert all(calls)


def test_a_hub_id_out_of_reach_says_how_to_fetch_it(monkeypatch):
    calls: list[bool] = []
    monkeypatch.setattr(ckpt_utils, "snapshot_download", hub(calls))
    with pytest.raises(FileNotFoundError) as error:
        load("organisation/model")
    assert calls == [True, False]
    assert "organisation/model is neither a folder here nor reachable on the Hugging Face hub" in str(
        error.value
    )
    assert "`hf download organisation/model`" in str(error.value)


@pytest.mark.parametrize(
    "left", ["config.json alone", "a shard without the index", "an index without a shard"]
)
def test_an_interrupted_download_is_taken_up_again(tmp_path, original, state, monkeypatch, left):
    partial, whole = tmp_path / "partial", tmp_path / "whole"
    original.save_pretrained(whole)
    original.save_pretrained(partial)
    shard = "model-00001-of-00002.safetensors"
    (partial / "model.safetensors").rename(partial / shard)
    if left == "config.json alone":
        (partial / shard).unlink()
    elif left == "an index without a shard":
        index = {"weight_map": {"a": shard, "b": "model-00002-of-00002.safetensors"}}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(
        ckpt_utils,
        "snapshot_download",
        lambda repo, *, local_files_only, allow_patterns: str(partial if local_files_only else whole),
    )
    assert_loaded(load("organisation/model"), state)


def test_local_files_only_asks_no_network(monkeypatch):
    calls: list[bool] = []
    monkeypatch.setattr(ckpt_utils, "snapshot_download", hub(calls))
    with pytest.raises(FileNotFoundError, match="`hf download organisation/vae`"):
        OpenSoraVAE_V1_2(from_pretrained="organisation/vae", local_files_only=True)
    assert calls == [True]


def test_a_damaged_config_is_named(tmp_path, original):
    original.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON or is damaged; fetch it again"):
        load(tmp_path)


@pytest.mark.parametrize("source", ["organisation/name", "a/b"])
def test_what_is_a_hub_id(source):
    assert ckpt_utils.is_hub_id(source)


@pytest.mark.parametrize("source", ["./name", "../name", "~/name", "/name", "name", "name/", "a/b/c"])
def test_what_is_no_hub_id(source):
    assert not ckpt_utils.is_hub_id(source)


def test_saving_and_loading_again_changes_nothing(tmp_path):
    model, vae = twins.stdit(), twins.vae()
    model.save_pretrained(tmp_path / "stdit")
    vae.save_pretrained(tmp_path / "vae")
    assert_loaded(load(tmp_path / "stdit"), model.state_dict())
    again = build_module(dict(type="OpenSoraVAE_V1_2", from_pretrained=str(tmp_path / "vae")), MODELS)
    video = torch.randn(1, 3, 5, 16, 16)
    assert torch.equal(again.encode(video), vae.encode(video))
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == ["config.json", "model.safetensors"]


def test_the_released_vae_config_gives_the_released_sizes(tmp_path, monkeypatch):
    """Its halves name checkpoints of their own, which are never asked for: the one file holds both."""
    config = dict(
        architectures=["VideoAutoencoderPipeline"],
        cal_loss=False,
        freeze_vae_2d=False,
        from_pretrained=None,
        micro_frame_size=17,
        scale=[3.85, 2.32, 2.33, 3.06],
        shift=[-0.1, 0.34, 0.27, 0.98],
        vae_2d=dict(
            from_pretrained="PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
            micro_batch_size=4,
            subfolder="vae",
            type="VideoAutoencoderKL",
        ),
        vae_temporal=dict(from_pretrained=None, type="VAE_Temporal_SD"),
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(vae_module, "load_pretrained", lambda model, source: model)
    vae = vae_module.OpenSoraVAE_V1_2(from_pretrained=str(tmp_path), micro_batch_size=2)
    assert vae.spatial_vae.module.config.block_out_channels == (128, 256, 512, 512)
    assert vae.spatial_vae.micro_batch_size == 2
    assert len(vae.temporal_vae.encoder.res_blocks) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_load(tmp_path, state, dtype):
    half = {key: value.to(dtype) for key, value in state.items()}
    save_file(half, tmp_path / "model.safetensors")
    model = load(tmp_path).to(torch.float32)
    assert_loaded(model, {key: value.float() for key, value in half.items()})


def test_an_interrupted_save_leaves_the_earlier_file(tmp_path, original, monkeypatch):
    original.save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(ckpt_utils, "save_model", fail)
    with pytest.raises(OSError, match="no space left"):
        twins.stdit(seed=4).save_pretrained(tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
