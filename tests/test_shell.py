"""The shell scripts, run by dash and bash in a folder whose path has a space, with a stand-in for Python.

The stand-in (`FAKE_PYTHON`) writes each call to a log instead of installing or training anything.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("scripts", "Open-Sora/scripts", "Open-Sora/script")
    for path in (ROOT / folder).glob("*.sh")
)
SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)]

# Answers what the scripts ask of Python; a call that matters leaves one line, its arguments joined by "|".
FAKE_PYTHON = r"""#!/bin/sh
case "$*" in
    *version_info*) exit "${FAKE_TOO_OLD:-0}" ;;
    *find_spec*) [ -z "${FAKE_NO_TORCH:-}" ]; exit ;;
    *"pip --version"*) exit ;;
    *"venv --clear"*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
    *--requirement*)
        sleep "${FAKE_PIP_SECONDS:-0}"
        if [ -n "${FAKE_PIP_ERROR:-}" ]; then echo "$FAKE_PIP_ERROR" >&2; exit 1; fi ;;
esac
{ printf '%s|' "$@"; echo; } >>"$FAKE_LOG"
if [ -n "${FAKE_PRINT:-}" ]; then pwd; echo "threads=${OMP_NUM_THREADS:-}"; fi
"""


class Checkout:
    """A copy of the scripts in a folder with a space in its name, and the stand-in to run them with."""

    def __init__(self, folder: Path, shell: str):
        self.root, self.shell = folder / "a b" / "repo", shell
        for name in [*SCRIPTS, "requirements.txt", "pyproject.toml"]:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.python = folder / "fake python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.log = folder / "calls"
        self.elsewhere = folder / "else where"
        self.elsewhere.mkdir()

    def command(self, script: str, *args: str) -> list[str]:
        return [self.shell, str(self.root / script), *args]

    def env(self, **extra) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("NUM_PROCESSES", "OMP_NUM_THREADS")}
        return {**kept, "PYTHON": str(self.python), "FAKE_LOG": str(self.log), **extra}

    def run(self, script: str, *args: str, cwd: Path | None = None, **extra) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(script, *args),
            cwd=cwd or self.elsewhere,
            env=self.env(**extra),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def calls(self) -> list[list[str]]:
        """The arguments of each logged call so far; the log starts afresh."""
        if not self.log.exists():
            return []
        lines = self.log.read_text().splitlines()
        self.log.unlink()
        return [line.split("|")[:-1] for line in lines]


@pytest.fixture(params=SHELLS)
def checkout(tmp_path, request) -> Checkout:
    return Checkout(tmp_path, request.param)


def installs(calls: list[list[str]]) -> int:
    return sum("--editable" in call for call in calls)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("shell", SHELLS)
def test_syntax(shell, script):
    subprocess.run([shell, "-n", str(ROOT / script)], check=True)


def test_setup_installs_once(checkout):
    assert checkout.run("scripts/setup.sh").returncode == 0
    requirements, editable = [call for call in checkout.calls() if "install" in call]
    assert requirements[-2:] == ["--requirement", str(checkout.root / "requirements.txt")]
    assert editable[-2:] == ["--editable", str(checkout.root)] and "--no-deps" in editable

    second = checkout.run("scripts/setup.sh")
    assert (second.returncode, second.stdout, checkout.calls()) == (0, "", [])


def test_setup_follows_changes(checkout):
    checkout.run("scripts/setup.sh")
    with open(checkout.root / "requirements.txt", "a") as file:
        file.write("one-more\n")
    checkout.calls()
    checkout.run("scripts/setup.sh")
    assert installs(checkout.calls()) == 1

    moved = checkout.root.with_name("moved")
    checkout.root.rename(moved)
    checkout.root = moved
    checkout.run("scripts/setup.sh")
    assert installs(checkout.calls()) == 1


@pytest.mark.parametrize("script", ["scripts/setup.sh", "scripts/quickstart.sh", "scripts/test.sh"])
def test_failing_install_stops(checkout, script):
    failed = checkout.run(script, FAKE_PIP_ERROR="ERROR: no matching distribution")
    assert failed.returncode != 0 and failed.stderr == "ERROR: no matching distribution\n"
    assert [call[:2] for call in checkout.calls()] == [["-m", "venv"]]

    assert checkout.run(script).returncode == 0, "the next run starts over"
    assert installs(checkout.calls()) == 1


def test_old_python_is_refused(checkout):
    refused = checkout.run("scripts/setup.sh", FAKE_TOO_OLD="1")
    assert refused.returncode == 2
    assert (
        refused.stderr
        == f"setup: PYTHON='{checkout.python}' is no working Python 3.11 or newer; set it to one.\n"
    )
    assert not (checkout.root / ".venv").exists()


@pytest.mark.skipif(
    not shutil.which("flock"), reason="without flock, simultaneous first runs are not kept apart"
)
def test_simultaneous_setups_take_turns(checkout):
    setups = [
        subprocess.Popen(
            checkout.command("scripts/setup.sh"),
            env=checkout.env(FAKE_PIP_SECONDS="0.5"),
            stdout=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    assert [setup.wait(timeout=60) for setup in setups] == [0, 0]
    assert installs(checkout.calls()) == 1


def test_quickstart_passes_arguments(checkout):
    assert checkout.run("scripts/quickstart.sh", "--seed", "1", "two words", "").returncode == 0
    demo = str(checkout.root / "scripts/demo/quickstart.py")
    assert checkout.calls()[-1] == [demo, "--seed", "1", "two words", ""]


def test_tests_run_in_the_root(checkout):
    checkout.run("scripts/setup.sh")
    ran = checkout.run("scripts/test.sh", "-k", "one or two", FAKE_PRINT="1")
    assert checkout.calls()[-1] == ["-m", "pytest", "-n", "2", "-k", "one or two"]
    assert ran.stdout.splitlines() == [str(checkout.root), "threads=1"]


def test_the_documentation_is_built_and_nothing_else_is_run(checkout):
    """No script that draws or writes into the checkout."""
    checkout.run("scripts/setup.sh")
    checkout.calls()
    assert checkout.run("scripts/docs.sh", "--site-dir", "x").returncode == 0
    calls = [call for call in checkout.calls() if call[0] != "-c"]
    assert calls == [["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", "x"]]


@pytest.mark.parametrize("folder", ["script", "scripts"])
@pytest.mark.parametrize(("kind", "command"), [("train", "train"), ("inference", "sample")])
def test_launchers_are_commands_of_the_package_beside_them(checkout, folder, kind, command):
    opensora = checkout.root / "Open-Sora"
    launched = checkout.run(f"Open-Sora/{folder}/run_text2video_{kind}.sh", "--cfg-options", "prompt=a b", "")
    assert launched.returncode == 0, launched.stderr
    [call] = checkout.calls()
    assert os.path.normpath(call[0]) == str(checkout.root / "Core" / "__main__.py") and call[1] == command
    assert os.path.normpath(call[2]) == f"{opensora}/configs/opensora-v1-2/vader/vader_{kind}.py"
    assert call[3:] == ["--cfg-options", "prompt=a b", ""]


def test_launchers_leave_it_to_the_command_which_config_is_meant(checkout):
    checkout.run("Open-Sora/script/run_text2video_train.sh", "wan/t2v_1_3b", "--seed", "3")
    assert checkout.calls()[0][1:] == ["train", "wan/t2v_1_3b", "--seed", "3"]


def test_launchers_of_a_patched_checkout_use_the_package_inside_it(checkout):
    (checkout.root / "Open-Sora" / "Core").mkdir()
    checkout.run("Open-Sora/script/run_text2video_train.sh")
    assert os.path.normpath(checkout.calls()[0][0]) == f"{checkout.root}/Open-Sora/Core/__main__.py"


def test_launchers_say_what_python_lacks(checkout):
    refused = checkout.run("Open-Sora/script/run_text2video_train.sh", FAKE_NO_TORCH="1")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and checkout.calls() == []
    assert "cannot import torch and mmengine; run scripts/setup.sh or set PYTHON" in refused.stderr
