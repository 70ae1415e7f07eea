"""The wheel in an empty environment and an empty folder: all that a newcomer has."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import Core

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("Core", "Open-Sora", "configs", "assets/demo", "assets/prompts", "scripts/demo")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
# Small videos in few steps: what is tested is where files come from and go to.
TINY = "--cfg-options scheduler.num_sampling_steps=2 --backprop-steps 1 --train-batch-size 1 --val-batch-size 1".split()
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
REWARD = """
from torch import Tensor
from Core.rewards import ImageReward, RewardInfo


class Redness(ImageReward):
    info = RewardInfo(name="redness", summary="red minus the others", range="-1 to 1")

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        red, green, blue = images.mean(dim=(2, 3)).unbind(1)
        return red - (green + blue) / 2
"""


class Installed:
    """An environment with the wheel in it, whose other packages are those of this one, and an empty folder."""

    def __init__(self, environment: Path, folder: Path):
        self.bin, self.folder = environment / "bin", folder
        (self.packages,) = environment.glob("lib/python*/site-packages")

    def run(self, *command: str) -> subprocess.CompletedProcess:
        """A command of the environment, as typed in the folder."""
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "NUM_PROCESSES")}
        return subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.folder,
            env=kept | {"HOME": str(self.folder / ".home"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
        )

    def files(self) -> set[Path]:
        return {path for path in self.packages.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """Built from a copy, since setuptools writes beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    offline = ("--no-deps", "--no-index")
    build = (*PIP, "wheel", *offline, "--no-build-isolation", "-w", "dist", ".")
    subprocess.run(build, cwd=folder, check=True, timeout=300)
    (wheel,) = (folder / "dist").glob("*.whl")
    assert wheel.name.startswith(f"vader_t2v-{Core.__version__}-")
    target = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(target)], check=True, timeout=120)
    (packages,) = target.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n", encoding="utf-8")
    subprocess.run([*PIP, "--python", str(target), "install", *offline, str(wheel)], check=True, timeout=300)
    return target


@pytest.fixture
def installed(environment, tmp_path) -> Installed:
    (tmp_path / "empty").mkdir()
    return Installed(environment, tmp_path / "empty")


def test_it_takes_nobodys_place(installed):
    assert installed.run("vader", "--version").stdout == f"vader {Core.__version__}\n"
    assert {
        path.name for path in installed.packages.iterdir() if path.suffix not in (".pth", ".dist-info")
    } == {"Core"}
    assert installed.run("python", "-c", "import opensora").returncode == 1
    code = "import Core.backbones, opensora, sys; sys.stdout.write(opensora.__file__)"
    found = Path(installed.run("python", "-c", code).stdout)
    assert found == installed.packages / "Core/checkout/Open-Sora/opensora/__init__.py"


def test_training_with_an_own_prompt_file_and_reward_file(installed):
    before = installed.files()
    (installed.folder / "prompts.txt").write_text(
        "a red circle that moves left\na blue square that moves right\n"
    )
    (installed.folder / "red.py").write_text(REWARD)
    own = ("--prompt-path", "prompts.txt", "--val-prompt-path", "prompts.txt", "--num-val-runs", "1")
    own += ("--reward-fn", "red.py:Redness", "--reward-args", "{}", "--max-train-steps", "2")
    done = installed.run("vader", "train", "vader_demo", *own, *TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    told = done.stderr.splitlines()
    assert told[0] == "loading PyTorch …", "the first output comes before what takes seconds"
    assert told.index("loading the model …") < told.index("validating at step 0 …")
    assert "step 0: validation on 1 video: " in done.stderr
    run = installed.folder / "runs" / "demo"
    assert (run / "adapter" / "adapter_model.safetensors").is_file() and (run / "report.html").is_file()
    assert len((run / "metrics.csv").read_text().splitlines()) == 3
    assert installed.files() == before, "nothing is written beside the package"


def test_the_quickstart(installed):
    before = installed.files()
    done = installed.run("vader", "quickstart", "--prompts", "12", "--max-train-steps", "1", *TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "12 held-out prompts, the same noise before and after:" in done.stdout
    assert {"before_after.mp4", "report.html", "adapter"} <= {
        path.name for path in (installed.folder / "runs" / "quickstart").iterdir()
    }
    assert installed.files() == before


def test_no_message_sends_a_reader_to_a_script_that_the_wheel_lacks():
    scripts = "|".join(path.name for path in (ROOT / "scripts").glob("*.py"))
    named = re.compile(rf"scripts/(?:{scripts})|run_text2video")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "Core").rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if named.search(line) and not line.lstrip().startswith(("#", '"""', "``"))
    ]
    assert not found
