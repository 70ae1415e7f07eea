"""An adapter's folder for the hub: the card tells what holds, its example runs, and nothing is pushed unasked."""

import ast
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import pytest
import torch
import yaml
from pipelines import config_for, loaded, save_wan, with_adapter

from Core.backbones import BACKBONES
from Core.config import load_config
from Core.generation.export import export
from Core.generation.jobs import fingerprint
from Core.generation.model_card import model_card
from Core.modules import lora
from Core.utils.shipped import WITHOUT_USERS_FILES
from scripts.export_adapter import main

ROOT = Path(__file__).resolve().parents[1]
HUB_ID = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
ROW = {"measure": "hps", "prompts_are": "held-out", "before": 0.25, "after": 0.281, "videos": 512}
ROW |= {"gain": 0.031, "low": 0.021, "high": 0.041, "win_rate": 0.8, "prompts": 256}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save_wan(tmp_path_factory.mktemp("wan") / kind, kind) for kind in ("2.1", "a14b")}


@pytest.fixture
def kind(request):
    return getattr(request, "param", "2.1")


@pytest.fixture
def adapter(folders, tmp_path, kind):
    """The adapter of a run of a tiny Wan, whose configuration names the published one."""
    backbone, _ = loaded("wan", folders[kind])
    run = tmp_path / "run"
    run.mkdir()
    lora.save(with_adapter(backbone).denoiser, run / "adapter")
    reward = {"reward_fn": {"hps": 1.0, "image_reward": 0.5}, "reward_args": {"hps": {"version": "v2.0"}}}
    keys = {
        **reward,
        "lora_rank": 2,
        "lora_alpha": 2,
        "text_cache": str(tmp_path / "secret"),
        "is_vader_training": True,
    }
    config_for("wan", folders[kind], model_path=HUB_ID, lr=3e-4, **keys).save(run / "config.py")
    return run / "adapter"


def digest(adapter: Path) -> str:
    return fingerprint(lora.read(str(adapter), BACKBONES.resolve("wan").original_names))


def card_of(folder: Path) -> tuple[dict, str]:
    """Metadata and text of a model card."""
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_tells_base_reward_settings_gains_and_licences(adapter, tmp_path):
    results = {
        "adapters": [
            {"name": "adapter", "adapter_sha256": digest(adapter)},
            {"name": "x", "adapter_sha256": ""},
        ]
    }
    results["summary"] = [{"adapter": "adapter", **ROW}, {"adapter": "x", **ROW, "measure": "of another"}]
    (adapter.parent / "evaluation").mkdir()
    (adapter.parent / "evaluation" / "evaluation.json").write_text(json.dumps(results))
    assert main([str(adapter), str(tmp_path / "out"), "--to", "hub"]) == 0
    data, text = card_of(tmp_path / "out")
    assert (
        data["base_model"] == HUB_ID
        and data["license"] == "apache-2.0"
        and data["library_name"] == "diffusers"
    )
    for line in (
        "| hps | held-out | 512 | 0.25 | 0.281 | +0.031 (+0.021 to +0.041) |",
        "| `hps` | 1.0 | `{'version': 'v2.0'}` |",
        "| `lr` | `0.0003` |",
        f"| [{HUB_ID}](https://huggingface.co/{HUB_ID}) | base model | Apache-2.0 |",
        "| [THUDM/ImageReward](https://huggingface.co/THUDM/ImageReward) | reward | Apache-2.0 |",
    ):
        assert f"\n{line}\n" in text
    assert "of another" not in text and str(tmp_path) not in text and "secret" not in text
    assert digest(tmp_path / "out") == digest(adapter)


def run_example(text: str, out: Path, pipeline: Path, monkeypatch) -> list:
    """Run the card's program on a tiny pipeline, on the CPU; the frames it would have written."""
    written = []
    monkeypatch.setattr(
        "diffusers.utils.export_to_video", lambda frames, file, fps: written.append((frames, file, fps))
    )
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for there, here in ((HUB_ID, str(pipeline)), ("owner/name", str(out)), ("bfloat16", "float32")):
        assert there in code
        code = code.replace(there, here)
    exec(code.replace('pipeline.to("cuda")', "pipeline.set_progress_bar_config(disable=True)"), {})
    return written


@pytest.mark.parametrize("kind", ["2.1", "a14b"], indirect=True)
def test_the_example_runs_in_diffusers(adapter, folders, kind, tmp_path, monkeypatch):
    loads, load = [], diffusers.WanPipeline.load_lora_weights
    export(str(adapter), tmp_path / "out", "hub")
    monkeypatch.setattr(
        diffusers.WanPipeline,
        "load_lora_weights",
        lambda *args, **own: loads.append(own) or load(*args, **own),
    )
    text = card_of(tmp_path / "out")[1]
    ((frames, _, fps),) = run_example(text, tmp_path / "out", folders[kind], monkeypatch)
    assert torch.as_tensor(frames).shape == (9, 32, 64, 3) and fps == 24
    named = {"weight_name": "pytorch_lora_weights.safetensors"}
    experts = [{"subfolder": name, **named} for name in ("high_noise", "low_noise")]
    experts[1] |= {"load_into_transformer_2": True}
    assert loads == ([{}] if kind == "2.1" else experts)


CONFIGS = sorted((ROOT / "configs").glob("*/*.py"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_config_has_a_card_whose_example_the_pipeline_takes(file):
    config = load_config([str(file), *WITHOUT_USERS_FILES])
    loads = bool(config.backbone.diffusers_component)
    text = model_card("me/fox", config, {"": ""} if loads else {}, [])
    assert ("```python" in text) == loads
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        calls = {
            ast.unparse(node.func): node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)
        }
        (name,) = (call.partition(".")[0] for call in calls if call.endswith("Pipeline.from_pretrained"))
        pipeline = getattr(diffusers, name)
        given = {keyword.arg for keyword in calls["pipeline"].keywords}
        assert (
            given <= inspect.signature(pipeline.__call__).parameters.keys()
            and {"height", "num_frames"} <= given
        )
        assert hasattr(pipeline, "load_lora_weights") == ("pipeline.load_lora_weights" in calls)
        assert ("pipeline.transformer.load_lora_adapter" in calls) != ("pipeline.load_lora_weights" in calls)


def test_results_of_another_adapter_are_not_its_own(adapter, tmp_path, capsys):
    results = {
        "adapters": [{"name": "adapter", "adapter_sha256": "0"}],
        "summary": [{"adapter": "adapter", **ROW}],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    command = [
        str(adapter),
        str(tmp_path / "out"),
        "--to",
        "hub",
        "--results",
        str(tmp_path / "results.json"),
    ]
    assert main(command) == 2 and "results of other adapters" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"summary": 3}')
    assert main(command) == 2 and "holds no results" in capsys.readouterr().err
    assert main(command[:-2]) == 0
    assert "## Gains\n\nNot measured.\n" in card_of(tmp_path / "out")[1]


def test_the_quickstarts_results_are_those_of_the_adapter_it_wrote_last(adapter, tmp_path):
    (adapter.parent / "before_after.json").write_text(
        json.dumps({"prompts": 256, "colour_and_shape": ROW, "x": 1.0})
    )
    export(str(adapter), tmp_path / "out", "hub")
    row = "| colour and shape | held-out | 512 | 0.25 | 0.281 | +0.031 (+0.021 to +0.041) |"
    assert row in card_of(tmp_path / "out")[1]
    older = adapter.parent / "checkpoints" / "step_000001" / "adapter"
    older.parent.mkdir(parents=True)
    adapter.rename(older)
    export(str(older), tmp_path / "older", "hub")
    assert row not in card_of(tmp_path / "older")[1]


CLIENT = huggingface_hub.HfApi


class Hub:
    """Takes what the real client takes, and keeps it."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **own):
            bound = inspect.signature(getattr(CLIENT, name)).bind(self, *args, **own).arguments
            self.calls.append((name, {key: value for key, value in bound.items() if key != "self"}))
            return SimpleNamespace(commit_url="https://huggingface.co/owner/name/commit/1")

        return call


def test_it_is_pushed_where_that_is_asked_and_private_by_default(adapter, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    assert main([str(adapter), str(tmp_path / "kept"), "--to", "hub"]) == 0 and not hub.calls
    assert main([str(adapter), str(tmp_path / "out"), "--to", "hub", "--push", "me/fox"]) == 0
    (created, uploaded) = hub.calls
    assert created == (
        "create_repo",
        {"repo_id": "me/fox", "repo_type": "model", "private": True, "exist_ok": True},
    )
    assert uploaded[0] == "upload_folder" and uploaded[1]["folder_path"] == tmp_path / "out"
    assert uploaded[1]["repo_id"] == "me/fox" and "commit/1" in caplog.text
    assert 'load_lora_weights("me/fox")' in card_of(tmp_path / "out")[1]
    assert main([str(adapter), str(tmp_path / "open"), "--to", "hub", "--push", "me/fox", "--public"]) == 0
    assert hub.calls[2][1]["private"] is False


def test_a_push_that_fails_loses_nothing(adapter, tmp_path, monkeypatch, capsys):
    def refuse(*args, **own):
        raise huggingface_hub.errors.LocalTokenNotFoundError("no token\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    assert main([str(adapter), str(tmp_path / "out"), "--to", "hub", "--push", "me/fox"]) == 2
    said = capsys.readouterr().err
    assert f"push it by `hf upload me/fox {tmp_path / 'out'}`" in said and "no token;" in said
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--to", "hub", "--push", "fox"], "--push takes a hub id (owner/name), got 'fox'"),
        (["--to", "hub", "--push", "me/fox@main"], "--push takes a hub id"),
        (["--to", "peft", "--push", "me/fox"], "--results and --push go with --format hub"),
        (["--to", "hub", "--public"], "--public goes with --push"),
    ],
)
def test_options_that_do_not_go_together(adapter, tmp_path, capsys, flags, sentence):
    assert main([str(adapter), str(tmp_path / "out"), *flags]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_adapter_of_no_run_needs_its_config(adapter, tmp_path, capsys):
    adapter.rename(tmp_path / "adapter")
    assert main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", "hub"]) == 2
    assert "name a config of the family with --config" in capsys.readouterr().err
