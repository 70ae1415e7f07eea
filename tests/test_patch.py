"""The patch onto an upstream checkout: what it writes, what it refuses, what it gives back, and a run on it."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import twin_runs
import twins
from safetensors.torch import save_file
from upstream import exercise

from Core.backbones import opensora_upstream as upstream
from Core.utils.hub import Weight
from Core.utils.state_dict import fill_strictly

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = ROOT / "tests" / "upstream" / "Open-Sora"
EXERCISE = ROOT / "tests" / "upstream" / "exercise.py"
# What upstream's main of July 2024 has other than its tag v1.2.0, which the stand-in follows.
LATER = (
    ("models/text_encoder/t5.py", "        assert from_pretrained in self.available_models\n", ""),
    ("models/vae/vae.py", "    cal_loss=False,\n):", "    cal_loss=False,\n    force_huggingface=False,\n):"),
    (
        "models/vae/vae.py",
        "    if from_pretrained is not None and not",
        "    if force_huggingface or from_pretrained and not",
    ),
    (
        "models/stdit/stdit3.py",
        "    if from_pretrained is not None and not",
        '    if kwargs.pop("force_huggingface", False) or from_pretrained and not',
    ),
)
SHAPE = "opensora/schedulers/rf/rectified_flow.py"


def patch(checkout: Path, *flags: str) -> subprocess.CompletedProcess:
    command = ["sh", str(ROOT / "scripts" / "patch_opensora.sh"), str(checkout), *flags]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below ``folder`` with its mode, and the target of a link or the hash of its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        link = os.readlink(path) if path.is_symlink() else ""
        found[str(path.relative_to(folder))] = f"{path.lstat().st_mode:o} {link} {content}"
    return found


def copy(target: Path, later: bool = False) -> Path:
    """The stand-in as upstream's tag or, if ``later``, as its main of July 2024."""
    shutil.copytree(STAND_IN, target, ignore=shutil.ignore_patterns("__pycache__"))
    for path, old, new in LATER if later else ():
        file = target / "opensora" / path
        assert file.read_text(encoding="utf-8").count(old) == 1
        file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    return target


@pytest.fixture(params=["tag", "later"])
def checkout(request, tmp_path):
    """An upstream checkout in a folder of its own, whose name has a space; it holds links and odd modes."""
    target = copy(tmp_path / "my models" / "Open-Sora", request.param == "later")
    sampler = target / "opensora/schedulers/rf/__init__.py"
    sampler.rename(tmp_path / "my models" / "my_sampler.py")
    sampler.symlink_to("../../../../my_sampler.py")
    (target / "setup.py").write_bytes("# J\xfcrgen's\n".encode("latin-1"))
    (target / "scripts" / "train.py").chmod(0o751)
    return target


@pytest.fixture
def tag(tmp_path):
    return copy(tmp_path / "Open-Sora")


def test_a_dry_run_shows_the_plan_and_changes_nothing(tag):
    before = snapshot(tag.parent)
    done = patch(tag, "--dry-run")
    assert done.returncode == 0
    assert "add      Core/training/trainer.py" in done.stdout
    assert "add      script/run_text2video_train.sh" in done.stdout
    assert snapshot(tag.parent) == before


def test_applying_puts_files_where_the_shell_scripts_look_and_changes_none_of_upstreams(checkout):
    before = snapshot(checkout.parent)
    assert patch(checkout).returncode == 0
    for path in ("Core/training/trainer.py", "assets/prompts/animals.txt"):
        assert (checkout / path).read_bytes() == (ROOT / path).read_bytes()
    script = "scripts/train_t2v_lora.py"
    assert (checkout / script).read_bytes() == (ROOT / "Open-Sora" / script).read_bytes()
    folder = "configs/opensora-v1-2/vader"
    given = re.search(
        r'"{{fileDirname}}/(.*)"', (checkout / folder / "vader_train.py").read_text(encoding="utf-8")
    )
    assert (checkout / folder / given[1]).resolve() == checkout / "assets/prompts/animals.txt"
    assert snapshot(checkout.parent).items() >= before.items()
    assert not list(checkout.parent.rglob("__pycache__"))


def test_applying_again_changes_nothing_and_reverting_gives_the_tree_back(checkout):
    before = snapshot(checkout.parent)
    patch(checkout)
    applied = snapshot(checkout.parent)
    again = patch(checkout)
    assert again.stdout == "the patch is on already\n"
    assert snapshot(checkout.parent) == applied
    (checkout / "Core" / "__pycache__").mkdir()
    assert patch(checkout, "--revert").returncode == 0
    assert snapshot(checkout.parent) == before
    assert "is not patched" in patch(checkout, "--revert").stderr


def test_two_checkouts_side_by_side_know_nothing_of_each_other(tmp_path):
    first, second = copy(tmp_path / "first"), copy(tmp_path / "second", later=True)
    before = snapshot(first)
    patch(first)
    patch(second)
    applied = snapshot(second)
    assert patch(first, "--revert").returncode == 0
    assert snapshot(first) == before and snapshot(second) == applied


def test_what_an_interrupted_run_left_is_finished_or_reverted(tag):
    before = snapshot(tag)
    patch(tag)
    applied = snapshot(tag)
    (tag / "Core/training/trainer.py").unlink()
    (tag / ".vader_patch.partial").write_text("half", encoding="utf-8")
    assert patch(tag).returncode == 0
    assert {**snapshot(tag), ".vader_patch.json": ""} == {**applied, ".vader_patch.json": ""}
    (tag / "Core/training/trainer.py").unlink()
    (tag / ".vader_patch.partial").write_text("half", encoding="utf-8")
    assert patch(tag, "--revert").returncode == 0
    assert snapshot(tag) == before


def test_an_update_that_was_interrupted_still_knows_what_it_wrote(tag):
    """The manifest already names the new file, the old one still lies there."""
    patch(tag)
    written = tag / "Core/training/trainer.py"
    new, manifest = written.read_bytes(), tag / ".vader_patch.json"
    written.write_text("old\n", encoding="utf-8")
    stored = json.loads(manifest.read_text(encoding="utf-8"))
    stored["files"]["Core/training/trainer.py"].insert(0, hashlib.sha256(b"old\n").hexdigest())
    manifest.write_text(json.dumps(stored), encoding="utf-8")
    assert "update   Core/training/trainer.py" in patch(tag).stdout
    assert written.read_bytes() == new


def test_edited_files_are_neither_overwritten_nor_removed(tag):
    patch(tag)
    config = tag / "configs/opensora-v1-2/vader/vader_train.py"
    config.write_text("lr = 1\n", encoding="utf-8")
    again = patch(tag)
    assert "keep     configs/opensora-v1-2/vader/vader_train.py" in again.stdout
    patch(tag, "--revert")
    assert config.read_text(encoding="utf-8") == "lr = 1\n"
    assert not (tag / "Core").exists()


@pytest.mark.parametrize("path", ["Core/training/trainer.py", "Core"])
def test_files_of_others_in_the_way_stop_it_before_anything_is_written(tag, path):
    (tag / path).parent.mkdir(parents=True, exist_ok=True)
    (tag / path).write_text("mine\n", encoding="utf-8")
    before = snapshot(tag)
    done = patch(tag)
    assert done.returncode == 2
    assert "stand in the way" in done.stderr and "Core/" in done.stderr
    assert snapshot(tag) == before


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda c: shutil.rmtree(c), "there is no folder"),
        (
            lambda c: (c / "opensora/models/stdit/stdit3.py").unlink(),
            "it lacks opensora/models/stdit/stdit3.py",
        ),
        (lambda c: (c / "configs/opensora-v1-3").mkdir(), "is Open-Sora v1.3"),
        (lambda c: (c / SHAPE).write_bytes(b"# \xfc"), "rectified_flow.py with 'def timestep_transform'"),
        (lambda c: (c / ".vader_patch.json").write_bytes(b"{\xfc"), "is damaged"),
        (lambda c: (c / ".vader_patch.json").write_text("[]"), "is damaged"),
        (lambda c: (c / ".vader_patch.json").write_text('{"files": {"../x": []}}'), "is damaged"),
    ],
)
def test_a_wrong_checkout_is_refused_in_a_sentence(tag, spoil, sentence):
    spoil(tag)
    done = patch(tag)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert sentence in done.stderr


def test_the_projects_own_package_is_refused():
    assert "needs no patch" in patch(ROOT / "Open-Sora").stderr


# The networks of this repository under upstream's names, in a checkout where theirs lie in ``opensora_here``.
NETWORKS = {
    "stdit/stdit3.py": """
import json
from opensora_here.models.stdit.stdit3 import STDiT3, STDiT3Config as Sizes

class STDiT3Config(Sizes):
    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        return cls(**json.loads((folder / "config.json").read_text()) | kwargs)
""",
    "vae/vae.py": """
from opensora.registry import MODELS
from opensora_here.models.vae.vae import (
    VideoAutoencoderKL, VideoAutoencoderPipeline, VideoAutoencoderPipelineConfig
)

@MODELS.register_module()
def OpenSoraVAE_V1_2(micro_batch_size=4, micro_frame_size=17, local_files_only=False):
    image = dict(type="VideoAutoencoderKL", config={image}, micro_batch_size=micro_batch_size)
    sizes = dict(vae_temporal={temporal}, micro_frame_size=micro_frame_size, scale=(0.0,) * 4, shift=(0.0,) * 4)
    return VideoAutoencoderPipeline(VideoAutoencoderPipelineConfig(vae_2d=image, **sizes))
""",
}


def with_networks_from_here(checkout: Path) -> Path:
    shutil.copytree(ROOT / "Open-Sora" / "opensora", checkout / "opensora_here")
    for file in (checkout / "opensora_here").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub(r"\b(from|import) opensora\b", r"\1 opensora_here", text), encoding="utf-8")
    for path, text in NETWORKS.items():
        text = text.replace("{image}", repr(twins.VAE_2D)).replace("{temporal}", repr(twins.VAE_TEMPORAL))
        (checkout / "opensora/models" / path).write_text(text, encoding="utf-8")
    return checkout


ONCE = dict(max_train_steps=1, grad_checkpoint=False)
WEIGHTS = {
    "model": "hpcai-tech/OpenSora-STDiT-v3",
    "vae": "hpcai-tech/OpenSora-VAE-v1.2",
    "text_encoder": "DeepFloyd/t5-v1_1-xxl",
}


@pytest.fixture(scope="module")
def runs(twin, tmp_path_factory):
    """Folder of one run each on the tag, the later main, and the tag with the networks here; see the tests."""
    root = tmp_path_factory.mktemp("runs")
    hub = root / "hub"
    shutil.copytree(twin / "t5", exercise.snapshot(hub, WEIGHTS["text_encoder"]))
    prompts = root / "prompts.txt"
    prompts.write_text("\n\n".join(twins.PROMPTS), encoding="utf-8")
    checkouts = {"tag": copy(root / "my tag"), "later": copy(root / "later", later=True)}
    checkouts["here"] = with_networks_from_here(copy(root / "here"))

    def config(name: str, sources: dict[str, str], **overrides) -> str:
        """Path of a config file with the checkout's own as its base."""
        values = twins.settings(twin, root / f"{name}_run", text_cache=str(root / "text"), **overrides)
        for key, source in sources.items():
            values[key]["from_pretrained"] = source
        name = name.removesuffix("_check")
        base = [str(checkouts[name] / "configs/opensora-v1-2/vader/vader_train.py")]
        return shlex.quote(str(twins.config_file(root / f"{name}.py", {"_base_": base, **values})))

    ours = dict(max_train_steps=1, val_batch_size=2, grad_checkpoint=True, prompt_path=str(prompts))
    local = {key: str(exercise.snapshot(hub, name)) for key, name in WEIGHTS.items()}
    absent = root / "absent.py"
    config("tag_check", WEIGHTS, **ours | {"reward_args": {}})
    (root / "tag.py").rename(absent)
    sample = "--is-vader-training False --end-index 1 --loop 2 --condition-frame-length 2 --align 1"
    tag = config("tag", local, **ours)
    folders = f"--lora-ckpt-path {root}/tag_run/adapter --project-dir {root}/out"
    words = [checkouts["tag"], f"{absent} --check-only", "weights", tag, f"{tag} {sample} {folders}"]
    words += ["--", checkouts["later"], config("later", WEIGHTS, **ours)]
    words += ["--", checkouts["here"], config("here", {}, **ONCE)]
    for checkout in checkouts.values():
        assert patch(checkout).returncode == 0
    environment = dict(
        PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", HF_HUB_CACHE=str(hub), HF_HUB_OFFLINE="1"
    )
    subprocess.run([sys.executable, EXERCISE, hub, root, *words], env=os.environ | environment)
    return root


def log(runs: Path, number: int) -> tuple[list[str], str]:
    """Exit statuses of the commands in a checkout, and all they said."""
    text = (runs / f"{number}.txt").read_text(encoding="utf-8")
    return re.findall(r"^exit (.*)$", text, re.MULTILINE), text


def first_row(run: Path) -> dict[str, float]:
    header, row = (run / "metrics.csv").read_text(encoding="utf-8").splitlines()[:2]
    pairs = zip(header.split(","), row.split(","), strict=True)
    return {key: float(value) for key, value in pairs if value}


def test_what_is_missing_is_named_before_anything_loads(runs):
    statuses, text = log(runs, 0)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert statuses[0] == "2" and len(errors) == 4
    image_vae = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers (subfolder vae)"
    for name in ("model.from_pretrained", "vae.from_pretrained", image_vae, "yuvalkirstain/PickScore_v1"):
        assert sum(name in error for error in errors) == 1, (name, errors)


def test_the_tag_trains_and_samples_from_local_folders(runs):
    """To an adapter and a video, with reentrant checkpoints and blank prompt lines."""
    statuses, text = log(runs, 0)
    assert statuses[1:] == ["0", "0"], text
    assert first_row(runs / "tag_run")["grad_norm"] > 0
    assert len(list((runs / "out").rglob("*.mp4"))) == 1


def test_the_later_main_trains_from_the_hubs_cache(runs):
    statuses, text = log(runs, 1)
    assert statuses == ["0"], text
    later, tag = first_row(runs / "later_run"), first_row(runs / "tag_run")
    for key in ("reward", "loss", "grad_norm"):
        assert later[key] == pytest.approx(tag[key], rel=1e-5)


def test_the_first_reward_is_that_of_the_package_here(runs, twin, tmp_path):
    """The same networks and weights through both: what is upstream's is text, sizes, timesteps and loading."""
    statuses, text = log(runs, 2)
    assert statuses == ["0"], text
    assert twin_runs.start(twin, tmp_path / "run", **ONCE) == 0
    here, there = first_row(tmp_path / "run"), first_row(runs / "here_run")
    assert there["reward"] == pytest.approx(here["reward"], rel=1e-5)
    assert there["grad_norm"] == pytest.approx(here["grad_norm"], rel=1e-4)


def test_what_upstreams_package_lacks_is_said(monkeypatch):
    monkeypatch.setattr(upstream, "locate", lambda weight: Path())
    monkeypatch.setitem(sys.modules, "opensora.models", None)
    folder = Weight(source=str(ROOT / "tests"))
    config, broken = upstream.errors([folder])
    assert "it has no config.json" in config
    assert "upstream's opensora cannot be imported" in broken


def test_weights_that_do_not_fill_a_model_are_refused(tmp_path):
    torch.save({"weight": torch.ones(3, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"not those of Linear: 1 missing: bias; 1 of another shape: weight \(3, 2\)"
    ):
        fill_strictly(torch.nn.Linear(2, 2), tmp_path)
    state = torch.nn.Linear(2, 2).state_dict()
    for key, tensor in state.items():
        save_file({key: tensor}, tmp_path / f"{key}.safetensors")
    (tmp_path / "pytorch_model.bin").unlink()
    index = {"weight_map": {key: f"{key}.safetensors" for key in state}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    filled = fill_strictly(torch.nn.Linear(2, 2), tmp_path)
    assert all(torch.equal(filled.state_dict()[key], tensor) for key, tensor in state.items())
