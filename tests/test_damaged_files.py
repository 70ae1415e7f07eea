"""Each file a run reads, damaged in each way: a sentence that names it, or it is made again; no code in it runs.

The files of a model or an adapter are found in the folders of the tiny twins, so that a new file joins by itself.
"""

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import report_runs
import reward_twins
import torch
import twins
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sampling_runs import picture
from torch import nn

from Core.backbones.opensora import OpenSora
from Core.build import new_backbone
from Core.config import build_config
from Core.data.video import read_video
from Core.evaluation.charts import Plot
from Core.evaluation.report import write_report
from Core.modules import lora
from Core.rewards import build_reward
from opensora.datasets.utils import read_from_path


class Code:
    """A pickle of this makes the file it is given."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def flipped(path: Path, trace: Path) -> None:
    """One byte of what says how to read the rest: a tensor file's header, or the beginning of a text."""
    content = bytearray(path.read_bytes())
    content[9 if path.suffix == ".safetensors" else 0] ^= 0xFF
    path.write_bytes(content)


def other_json(path: Path, trace: Path) -> None:
    path.write_text("[]")


def retyped(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path, Path], None]:
    """Every tensor of a file replaced by another."""

    def damage(path: Path, trace: Path) -> None:
        if path.suffix != ".safetensors":
            other_json(path, trace)
            return
        with safe_open(path, "pt") as content:
            metadata = content.metadata()
        save_file({key: change(value) for key, value in load_file(path).items()}, path, metadata)

    return damage


def code(path: Path, trace: Path) -> None:
    path.write_bytes(pickle.dumps(Code(trace)))


def folder(path: Path, trace: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "empty": lambda path, trace: path.write_bytes(b""),
    "truncated": lambda path, trace: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": flipped,
    "other JSON": other_json,
    "scalars": retyped(lambda tensor: tensor.flatten()[0].clone()),
    "whole numbers": retyped(lambda tensor: tensor.to(torch.int8)),
    "code": code,
    "folder": folder,
}


def load_adapter(place: Path) -> None:
    lora.read(place)


def load_denoiser(place: Path) -> None:
    load_family(model=dict(type="STDiT3-XL/2", from_pretrained=str(place)))


def load_vae(place: Path) -> None:
    load_family(vae=dict(type="OpenSoraVAE_V1_2", from_pretrained=str(place), micro_frame_size=17))


def load_text_encoder(place: Path) -> None:
    backbone = family(
        text_encoder=dict(type="t5", from_pretrained=str(place), model_max_length=twins.TEXT_LENGTH)
    )
    with backbone.loading("the text encoder", backbone.text_weights):
        backbone.text_encoder().encode(["a fox"])


def family(**entries) -> OpenSora:
    values = twins.settings(PLACES["family"], PLACES["family"] / "run", **entries)
    return new_backbone(build_config(values), torch.device("cpu"))


def load_family(**entries) -> None:
    backbone = family(**entries)
    with backbone.loading("the model", ["model.from_pretrained", "vae.from_pretrained"]):
        backbone.load()


def scorer(name: str, **arguments) -> Callable[[Path], None]:
    return lambda place: build_reward(name, {"model": str(place), **arguments})


# What is loaded from which folder of a twin.
LOADED: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None]]] = {
    "adapter": (lambda place: save_adapter(place), load_adapter),
    "denoiser": (lambda place: saved(twins.stdit(), place), load_denoiser),
    "vae": (lambda place: saved(twins.vae(), place), load_vae),
    "text encoder": (twins.t5_folder, load_text_encoder),
    "pick_score": (reward_twins.clip_folder, scorer("pick_score")),
    "clip_score": (reward_twins.siglip_folder, scorer("clip_score")),
    "actpred": (reward_twins.videomae_folder, scorer("actpred")),
    "object_detection": (reward_twins.yolos_folder, scorer("object_detection", label="cat")),
    "vjepa": (reward_twins.vjepa_folder, scorer("vjepa")),
}
PLACES: dict[str, Path] = {}
# Read for their words alone, and none of them decides how a network computes.
UNREAD = ("README.md", "generation_config.json", "special_tokens_map.json")


def saved(model: nn.Module, place: Path) -> Path:
    model.save_pretrained(place)
    return place


def save_adapter(place: Path) -> Path:
    lora.save(lora.attach(twins.stdit(), OpenSora.lora_targets, rank=2, alpha=2), place)
    return place


@pytest.fixture(scope="module")
def place_of(twin, tmp_path_factory):
    """The sound folder of each name, made once."""
    PLACES["family"] = twin
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = LOADED[name][0](tmp_path_factory.mktemp("sound") / name.replace(" ", "_"))
        return made[name]

    return get


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", LOADED)
def test_a_damaged_file_is_named(place_of, tmp_path, name, damage):
    sound, load = place_of(name), LOADED[name][1]
    names = [path.name for path in sound.iterdir() if path.is_file() and path.name not in UNREAD]
    assert names
    for file in names:
        trace, copy = tmp_path / "trace", tmp_path / "copy"
        shutil.copytree(sound, copy)
        DAMAGES[damage](copy / file, trace)
        try:
            load(copy)
        except (ValueError, OSError) as error:
            told = str(error)
            assert str(copy) in told and "no reason given" not in told, (file, told)
            assert "weights_only" not in told and "\n" not in told, (file, told)
            assert not told.rstrip().endswith(":"), (file, told)
        else:
            pytest.fail(f"{file} {damage} was taken")
        assert not trace.exists()
        shutil.rmtree(copy)


def test_sound_folders_load(place_of, caplog):
    with caplog.at_level(logging.ERROR):
        for name, (_, load) in LOADED.items():
            load(place_of(name))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(r=8), "is of rank 2, and its adapter_config.json says r=8; mend the file that is wrong"),
        (dict(r="2"), "says r='2'"),
        (dict(target_modules=["qkv", "to_q"]), "has no tensors for 'to_q', which target_modules"),
    ],
)
def test_an_adapter_and_its_settings_must_agree(place_of, tmp_path, changes, told):
    place = shutil.copytree(place_of("adapter"), tmp_path / "adapter")
    settings = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(ValueError) as error:
        lora.read(place)
    assert told in str(error.value)


@pytest.mark.parametrize(
    "shards", [[], {"a": 1}, {"a": "../model.safetensors"}, {"a": "/model.safetensors"}], ids=str
)
def test_an_index_names_files_beside_it(place_of, tmp_path, shards):
    place = shutil.copytree(place_of("pick_score"), tmp_path / "clip")
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(
        ValueError, match="model.safetensors.index.json (must have a weight_map|names the file)"
    ):
        build_reward("pick_score", {"model": str(place)})


def run_files(sound: Path) -> list[str]:
    suffixes = (".csv", ".json", ".jsonl", ".txt", ".py", ".mp4")
    return sorted(str(p.relative_to(sound)) for p in sound.rglob("*") if p.suffix in suffixes and p.is_file())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with an evaluation and a checkpoint's manifest."""
    run = report_runs.training_run(tmp_path_factory.mktemp("finished") / "run", steps=4)
    report_runs.evaluation(run / "evaluation")
    (run / "checkpoints" / "step_000004").mkdir(parents=True)
    (run / "checkpoints" / "step_000004" / "manifest.json").write_text(json.dumps({"sha256": {"a": "b"}}))
    return run


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name not in ("scalars", "whole numbers")])
def test_a_damaged_run_folder_is_named_or_reported_without(finished, tmp_path, damage, monkeypatch):
    """A report of what is left, or a sentence on what is not; never anything else."""
    plot = Plot("<svg></svg>", {"lines": []})
    monkeypatch.setattr("Core.evaluation.report.line_chart", lambda *_, **__: plot)
    monkeypatch.setattr("Core.evaluation.report.stack_chart", lambda *_, **__: plot)
    files = [
        name for name in run_files(finished) if not name.endswith(".mp4") or name.endswith("0000_200.mp4")
    ]
    assert len(files) > 8
    for file in files:
        copy = shutil.copytree(finished, tmp_path / "copy")
        DAMAGES[damage](copy / file, tmp_path / "trace")
        try:
            write_report(copy)
        except (ValueError, OSError) as error:
            assert Path(file).name in str(error) and "\n" not in str(error), (file, str(error))
        assert not (tmp_path / "trace").exists()
        shutil.rmtree(copy)


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name not in ("scalars", "whole numbers")])
@pytest.mark.parametrize("frames", [1, 9], ids=["picture", "video"])
def test_a_damaged_reference_is_named(tmp_path, frames, damage):
    file = Path(picture(tmp_path / "reference", frames=frames))
    DAMAGES[damage](file, tmp_path / "trace")
    for read in (lambda: read_from_path(file, (8, 8)), lambda: read_video(file)):
        try:
            assert read().shape[0] == 3  # decoders mend a flipped byte
        except (ValueError, FileNotFoundError) as error:
            assert "reference." in str(error)
    assert not (tmp_path / "trace").exists()
