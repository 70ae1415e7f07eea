"""The patch onto an upstream checkout: what it writes, what it refuses, what it gives back, and a run on it."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import twins

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = ROOT / "tests" / "upstream" / "Open-Sora"
SAMPLER = "opensora/schedulers/rf/__init__.py"
# Builds the stand-in's networks with upstream's own registry, and uses its scheduler as upstream's scripts do.
MAKE_WEIGHTS = """
import sys, torch
from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config
from opensora.models.vae.vae import OpenSoraVAE_V1_2
from opensora.registry import SCHEDULERS, build_module
import opensora.schedulers
torch.manual_seed(0)
sizes = dict(depth=1, hidden_size=32, num_heads=2, caption_channels=32, model_max_length=24)
model = STDiT3(STDiT3Config(**sizes)).eval()
model.save_pretrained(sys.argv[1] + "/stdit")
OpenSoraVAE_V1_2().save_pretrained(sys.argv[1] + "/vae")
scheduler = build_module(dict(type="rflow", sample_method="logit-normal"), SCHEDULERS)
assert type(scheduler).__module__ == "Core.backbones.opensora_sampling", type(scheduler)
kwargs = dict(y=torch.randn(2, 1, 24, 32), **{k: torch.ones(2) for k in ("fps", "height", "width")})
losses = scheduler.training_losses(model, torch.randn(2, 4, 2, 4, 4), kwargs, t=torch.tensor([10.0, 900.0]))
assert losses["loss"].shape == (2,)
"""


def patch(checkout: Path, *flags: str) -> subprocess.CompletedProcess:
    command = ["sh", str(ROOT / "scripts" / "patch_opensora.sh"), str(checkout), *flags]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below ``folder`` with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def python(checkout: Path, *arguments: str) -> str:
    """Run Python in a checkout as its users do, without bytecode that would change the tree."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=checkout
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def checkout(tmp_path):
    """An upstream checkout in a folder of its own, whose name has a space."""
    target = tmp_path / "my models" / "Open-Sora"
    shutil.copytree(STAND_IN, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def test_a_dry_run_shows_the_plan_and_changes_nothing(checkout):
    before = snapshot(checkout.parent)
    done = patch(checkout, "--dry-run")
    assert done.returncode == 0
    assert "add      Core/training/trainer.py" in done.stdout
    assert "add      Open-Sora/script/run_text2video_train.sh" in done.stdout
    assert f"replace  Open-Sora/{SAMPLER}" in done.stdout
    assert snapshot(checkout.parent) == before


def test_applying_puts_files_where_the_shell_scripts_look(checkout):
    original = (checkout / SAMPLER).read_bytes()
    assert patch(checkout).returncode == 0
    for path in ("Core/training/trainer.py", "assets/prompts/animals.txt"):
        assert (checkout.parent / path).read_bytes() == (ROOT / path).read_bytes()
    for path in ("scripts/train_t2v_lora.py", "configs/opensora-v1-2/vader/vader_train.py"):
        assert (checkout / path).read_bytes() == (ROOT / "Open-Sora" / path).read_bytes()
    assert (checkout / f"{SAMPLER}.upstream").read_bytes() == original
    assert not list(checkout.parent.rglob("__pycache__"))


def test_applying_again_changes_nothing_and_reverting_gives_the_tree_back(checkout):
    before = snapshot(checkout.parent)
    patch(checkout)
    applied = snapshot(checkout.parent)
    again = patch(checkout)
    assert again.stdout == "the patch is on already\n"
    assert snapshot(checkout.parent) == applied
    (checkout.parent / "Core" / "__pycache__").mkdir()
    assert patch(checkout, "--revert").returncode == 0
    assert snapshot(checkout.parent) == before
    assert "is not patched" in patch(checkout, "--revert").stderr


def test_what_an_interrupted_run_left_is_finished_or_reverted(checkout):
    before = snapshot(checkout.parent)
    patch(checkout)
    applied = snapshot(checkout.parent)
    (checkout / f"{SAMPLER}.upstream").rename(checkout / SAMPLER)
    (checkout.parent / "Core" / "training" / "trainer.py").unlink()
    assert patch(checkout).returncode == 0
    assert snapshot(checkout.parent) == applied
    shutil.copy(checkout / f"{SAMPLER}.upstream", checkout / SAMPLER)
    assert patch(checkout, "--revert").returncode == 0
    assert snapshot(checkout.parent) == before


def test_edited_files_are_neither_overwritten_nor_removed(checkout):
    patch(checkout)
    config = checkout / "configs/opensora-v1-2/vader/vader_train.py"
    config.write_text("lr = 1\n", encoding="utf-8")
    again = patch(checkout)
    assert "keep     Open-Sora/configs/opensora-v1-2/vader/vader_train.py" in again.stdout
    patch(checkout, "--revert")
    assert config.read_text(encoding="utf-8") == "lr = 1\n"
    assert not (checkout.parent / "Core").exists()


def test_an_edited_sampler_is_not_thrown_away(checkout):
    patch(checkout)
    with (checkout / SAMPLER).open("a", encoding="utf-8") as file:
        file.write("# mine\n")
    done = patch(checkout, "--revert")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "was edited since it was patched" in done.stderr


def test_files_of_others_in_the_way_stop_it_before_anything_is_written(checkout):
    other = checkout.parent / "Core" / "training" / "trainer.py"
    other.parent.mkdir(parents=True)
    other.write_text("mine\n", encoding="utf-8")
    before = snapshot(checkout.parent)
    done = patch(checkout)
    assert done.returncode == 2
    assert "stand in the way" in done.stderr and "../Core/training/trainer.py" in done.stderr
    assert snapshot(checkout.parent) == before


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda c: shutil.rmtree(c), "there is no folder"),
        (
            lambda c: (c / "opensora/models/stdit/stdit3.py").unlink(),
            "it lacks opensora/models/stdit/stdit3.py",
        ),
        (lambda c: (c / "setup.py").write_text('setup(version="1.0.0")'), "is Open-Sora 1.0.0"),
        (lambda c: (c / SAMPLER).write_text(""), "defines no class RFLOW"),
    ],
)
def test_a_wrong_checkout_is_refused_in_a_sentence(checkout, spoil, sentence):
    spoil(checkout)
    done = patch(checkout)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert sentence in done.stderr


def test_the_projects_own_package_is_refused():
    assert "needs no patch" in patch(ROOT / "Open-Sora").stderr


def test_training_and_inference_run_on_upstreams_package(checkout, twin, tmp_path):
    """From the shell's entry point to an adapter and a video, with reentrant checkpoints and blank prompt lines."""
    assert patch(checkout).returncode == 0
    python(checkout, "-c", MAKE_WEIGHTS, str(tmp_path))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n".join(twins.PROMPTS), encoding="utf-8")
    values = twins.settings(
        twin,
        tmp_path / "run",
        max_train_steps=1,
        val_batch_size=2,
        grad_checkpoint=True,
        prompt_path=str(prompts),
    )
    for key, folder in (("model", "stdit"), ("vae", "vae")):
        values[key] |= {"from_pretrained": str(tmp_path / folder), "force_huggingface": True}
    base = "configs/opensora-v1-2/vader/vader_train.py"
    config = twins.config_file(tmp_path / "config.py", {"_base_": [str(checkout / base)], **values})
    script = str(checkout / "scripts" / "train_t2v_lora.py")
    python(checkout, script, str(config))
    assert gradient_norm(tmp_path / "run") > 0
    adapter = ["--lora-ckpt-path", str(tmp_path / "run" / "adapter"), "--is-vader-training", "False"]
    out = ["--project-dir", str(tmp_path / "out"), "--end-index", "1"]
    long = ["--loop", "2", "--condition-frame-length", "2", "--align", "1"]
    python(checkout, script, str(config), *adapter, *out, *long)
    assert len(list((tmp_path / "out").rglob("*.mp4"))) == 1


def gradient_norm(run: Path) -> float:
    header, row = (run / "metrics.csv").read_text(encoding="utf-8").splitlines()[:2]
    return float(dict(zip(header.split(","), row.split(","), strict=True))["grad_norm"])
