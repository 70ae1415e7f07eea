"""The notebook does what the quickstart does; the Dockerfile names files and versions that there are."""

import ast
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from Core import __version__

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
INSTRUCTIONS = {"FROM", "RUN", "COPY", "ENV", "WORKDIR", "VOLUME", "CMD"}


@pytest.fixture
def notebook(monkeypatch):
    """The notebook, and what its cells display."""
    shown: list[Path] = []
    display = ModuleType("IPython.display")
    display.Image = lambda filename: filename
    display.Video = lambda file, embed: file
    display.display = lambda file: shown.append(Path(file))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(ROOT / "examples")
    return json.loads(NOTEBOOK.read_text(encoding="utf-8")), shown


def test_the_notebook_runs_with_small_settings(notebook, tmp_path, capsys):
    cells, shown = notebook[0]["cells"], notebook[1]
    small = ("max-train-steps", "train-batch-size", "num-val-runs", "val-batch-size")
    flags = [*(f"--{key}=1" for key in small), "--num-sampling-steps=3", "--verbose=0"]
    namespace: dict = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        exec("".join(cell["source"]), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            namespace |= {"PROMPTS": 4, "FOLDER": tmp_path / "run", "FLAGS": flags}
    assert [file.name for file in shown] == ["contact_sheet.png", "reward_curve.png", "before_after.mp4"]
    assert all(file.is_file() for file in shown)
    assert re.search(r"reward +\d+\.\d+ → \d+\.\d+ ", capsys.readouterr().out)


def test_the_notebook_is_kept_without_output(notebook):
    cells = notebook[0]["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["cell_type"] == "markdown" or not (cell["outputs"] or cell["execution_count"])


def test_the_notebook_finds_the_demo_from_any_folder(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    exec("".join(notebook[0]["cells"][1]["source"]), {})
    assert (Path(sys.path[0]) / "scripts" / "demo" / "compare.py").is_file()


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile with their arguments, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines]


def test_the_dockerfile_pins_its_base_and_uses_what_there_is():
    found = instructions()
    assert found[0][0] == "FROM" and {name for name, _ in found} <= INSTRUCTIONS
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", found[0][1])
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for name, argument in found:
        for file in re.findall(r"(?<![\w/])(?:scripts|Open-Sora)/[\w./-]+", argument):
            assert (ROOT / file).is_file() and not any(Path(file).match(pattern) for pattern in ignored)
        if name in ("CMD", "VOLUME"):
            assert all(isinstance(word, str) for word in ast.literal_eval(argument))
    assert any("scripts/setup.sh" in argument for name, argument in found if name == "RUN")


def test_what_git_ignores_is_not_copied_into_the_image():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    kept_out = {
        line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line and line[0] != "#"
    }
    tools = {".pytest_cache", ".ruff_cache", ".import_linter_cache"}
    assert {pattern.removeprefix("**/") for pattern in ignored} >= kept_out - tools


def test_the_change_log_has_the_version():
    listed = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "docs" / "changelog.md").read_text(), re.MULTILINE)
    assert listed[0] == __version__
