"""The page on rewards is up to date, its example works, and the download script finds what a config needs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import errors
from reward_twins import clip_folder, open_clip_state

from Core.rewards import REGISTRY, build_reward, check_reward_config
from Core.rewards.aesthetic import LAION_HEAD
from Core.rewards.aesthetic_v2_5 import HEAD
from Core.utils import hub as weights_module

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import download_weights  # noqa: E402
import write_reward_table  # noqa: E402


def test_page_is_what_the_registry_says():
    page = write_reward_table.PAGE.read_text(encoding="utf-8")
    assert write_reward_table.render(page) == page, "run python scripts/write_reward_table.py"
    assert "| `vjepa` |" in page and "### `vjepa`" in page


def test_example_of_an_own_scorer_trains_and_validates():
    spec = f"{ROOT / 'docs' / 'my_reward.py'}:Daylight"
    reward = build_reward({spec: 1.0, "motion": 0.1}, {spec: {"bright": 0.7}})
    frames = torch.zeros(2, 2, 3, 8, 8, requires_grad=True)
    output = reward(frames, ["a sunny field", "a street at night"])
    torch.testing.assert_close(output.parts["daylight"], torch.tensor([-0.2, -0.35]))
    assert (torch.autograd.grad(output.loss.sum(), frames)[0] != 0).all()
    assert "bright must be a number, got 'very'" in check_reward_config(spec, {"bright": "very"})[0]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[tuple]:
    """A hub that serves twins to `snapshot_download`; records (repository, patterns) of each download."""
    downloads = []
    twin = clip_folder(tmp_path / "twin")

    def snapshot_download(source, allow_patterns=None, local_dir=None, local_files_only=False):
        if local_files_only:
            raise FileNotFoundError("nothing cached")
        downloads.append((source, tuple(allow_patterns)))
        folder = Path(local_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (path.name for pattern in allow_patterns for path in twin.glob(pattern)):
            (folder / name).write_bytes((twin / name).read_bytes())
        if "HPS_v2.1_compressed.pt" in allow_patterns:
            torch.save({"state_dict": open_clip_state()}, folder / "HPS_v2.1_compressed.pt")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return downloads


CONFIG = """
model = dict(type="STDiT3-XL/2", from_pretrained="hpcai-tech/OpenSora-STDiT-v3")
vae = dict(type="OpenSoraVAE_V1_2", from_pretrained="hpcai-tech/OpenSora-VAE-v1.2")
text_encoder = dict(type="t5", from_pretrained="DeepFloyd/t5-v1_1-xxl", model_max_length=300)
scheduler = dict(type="rflow", num_sampling_steps=30, cfg_scale=7.0)
prompt = ["a fox"]
reward_fn = {"hps": 1.0, "pick_score": 0.5}
monitors = ["clip_score"]
"""


def test_download_brings_what_a_config_needs_and_prints_lines_that_work(hub, tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    command = ["--config", str(tmp_path / "config.py"), "--to", str(tmp_path / "weights")]
    assert download_weights.main([*command, "--list"]) == 0 and not hub
    assert download_weights.main(command) == 0
    printed = capsys.readouterr().out
    assert (
        "4.8 GB  hpcai-tech/OpenSora-STDiT-v3" in printed and "xswu/HPSv2 HPS_v2.1_compressed.pt" in printed
    )
    assert [source for source, _ in hub] == [
        "hpcai-tech/OpenSora-STDiT-v3",
        "hpcai-tech/OpenSora-VAE-v1.2",
        "DeepFloyd/t5-v1_1-xxl",
        "xswu/HPSv2",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "yuvalkirstain/PickScore_v1",
        "openai/clip-vit-large-patch14",
    ]
    assert not any("bin" in pattern for _, patterns in hub for pattern in patterns)

    values: dict = {}
    exec(printed[printed.index("# opensora") :], values)  # the lines are Python, for a config file
    assert Path(values["vae"]["from_pretrained"]) == tmp_path / "weights" / "hpcai-tech--OpenSora-VAE-v1.2"
    reward = build_reward({"hps": 1.0, "pick_score": 0.5}, values["reward_args"])
    build_reward("clip_score", values["monitor_args"]["clip_score"])
    assert reward(torch.zeros(1, 1, 3, 16, 16), ["a fox"]).score.isfinite()

    hub.clear()
    assert download_weights.main(command) == 0 and not hub  # complete: nothing is fetched again


def test_pickled_models_are_fetched_only_where_there_are_no_others(hub, tmp_path, monkeypatch):
    (tmp_path / "twin" / "model.safetensors").rename(tmp_path / "twin" / "pytorch_model.bin")
    weight = weights_module.Weight(source="owner/name")
    assert weights_module.locate(weight, tmp_path / "to") == tmp_path / "to" / "owner--name"
    assert [patterns[-1] for _, patterns in hub] == ["model*.safetensors", "pytorch_model*.bin"]


def refused(error: Exception, cause: Exception | None = None):
    def snapshot_download(*args, **kwargs):
        raise error from cause

    return snapshot_download


def hub_errors():
    """Errors as huggingface_hub raises them, with the sentence that each becomes."""
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    unreachable = errors.LocalEntryNotFoundError("Got: ConnectError: no such host\nAn error happened while")
    yield unreachable, OSError("no such host"), "the hub cannot be reached: no such host"
    yield (
        errors.LocalEntryNotFoundError("Cannot find"),
        errors.OfflineModeIsEnabled("x"),
        "HF_HUB_OFFLINE is set",
    )
    yield (
        errors.GatedRepoError("x", response=response),
        None,
        "consent: give it on https://huggingface.co/owner/name,",
    )
    yield (
        errors.RepositoryNotFoundError("x", response=response),
        None,
        "no repository 'owner/name' that this account",
    )
    yield (
        errors.RevisionNotFoundError("x", response=response),
        None,
        "no such revision; check what follows the @",
    )
    yield RuntimeError("the storage\nis away"), None, "(the storage)"


@pytest.mark.parametrize(
    ("error", "cause", "sentence"), list(hub_errors()), ids=lambda value: type(value).__name__
)
def test_why_the_hub_gives_nothing_is_said_with_what_to_do(monkeypatch, error, cause, sentence):
    monkeypatch.setattr("huggingface_hub.snapshot_download", refused(error, cause))
    weight = weights_module.Weight(source="owner/name@main", size=7_000_000, named_by="model_path")
    with pytest.raises(FileNotFoundError) as raised:
        weights_module._download_snapshot(weight.source, ("*",), None)
    assert sentence.strip("()") in str(raised.value)
    monkeypatch.setattr(weights_module, "_cached_snapshot", lambda source: None)
    with pytest.raises(FileNotFoundError) as raised:
        weights_module.locate(weight)
    message = str(raised.value)
    assert "owner/name@main, about 7.0 MB, named by model_path" in message and sentence in message
    elsewhere = not isinstance(error, errors.HfHubHTTPError)  # another network would not help
    assert ("vader download" in message) == elsewhere and "Got:" not in message


def test_what_is_fetched_is_named_with_its_licence(hub, tmp_path, caplog):
    caplog.set_level("INFO", logger="vader")
    weights_module.locate(weights_module.Weight(source="owner/name", licence="AGPL-3.0"), tmp_path / "to")
    assert "fetching owner/name, licence AGPL-3.0" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"download the file \(licence AGPL-3.0\) and give its path"):
        weights_module.locate(HEAD)


def test_repositories_of_the_same_name_go_to_folders_of_their_own(hub, tmp_path):
    folders = {weights_module.locate(weights_module.Weight(source=f"{o}/x"), tmp_path / "to") for o in "ab"}
    assert len(folders) == len(hub) == 2


def test_pinned_file_is_checked_against_its_hash(tmp_path, monkeypatch):
    def download_url_to_file(url, target, hash_prefix):
        assert hash_prefix == LAION_HEAD.sha256 and re.fullmatch("[0-9a-f]{64}", hash_prefix)
        raise RuntimeError("invalid hash value")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download_url_to_file)
    (tmp_path / LAION_HEAD.name).write_bytes(b"something else")
    with pytest.raises(FileNotFoundError, match="invalid hash value"):
        weights_module.locate(LAION_HEAD, tmp_path)
    with pytest.raises(FileNotFoundError, match="not a pinned address"):
        weights_module.locate(LAION_HEAD.at("https://example.org/head.pth"))


def test_mistakes_and_unreachable_weights_exit_with_2_and_one_sentence(hub, tmp_path, monkeypatch, capsys):
    assert download_weights.main(["--reward", "pikscore"]) == 2
    assert "unknown reward 'pikscore': did you mean 'pick_score'?" in capsys.readouterr().err

    def unreachable(*args, **kwargs):
        raise OSError("name not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert download_weights.main(["--reward", "pick_score", "hps", "--to", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    for part in (
        "3 of the weights",
        "PickScore_v1, about 3.9 GB",
        "xswu/HPSv2 (HPS_v2.1_compressed.pt)",
        "(name not known)",
    ):
        assert part in message
    with pytest.raises(SystemExit):
        download_weights.main([])


def test_the_readme_names_every_reward():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Rewards")[2].partition("## ")[0]
    assert set(REGISTRY) <= set(re.findall(r"`(\w+)`", table))
    assert f"and {len(REGISTRY)} rewards" in (ROOT / "README.md").read_text(encoding="utf-8")
