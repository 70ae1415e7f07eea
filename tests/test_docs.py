"""The documentation holds: commands run, files shown are the files, links lead somewhere, tables are current."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import write_command_line, write_options

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
# `<!-- runnable -->`, `<!-- runnable: command to run first -->` or `<!-- runnable: fails -->` before a block of shell.
RUNNABLE = re.compile(r"<!-- runnable(?:: ([^>]*?))? -->\n```sh\n(.*?)```", re.DOTALL)
SHOWN = re.compile(r"<!-- file: (\S+) -->\n```\w*\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The fragments a page's headings can be reached by."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.fixture
def repository(tmp_path):
    """The repository as a user sees it, where what commands write goes to a folder of its own."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", "build", ".git", ".venv"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    programs = {"python": "", "vader": f' "{ROOT}/Core/__main__.py"'}
    for name, program in programs.items():
        file = tmp_path / ".venv" / "bin" / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}"{program} "$@"\n', encoding="utf-8")
        file.chmod(0o755)
    return tmp_path


def shell(command: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a block as a user would paste it, stopping at its first failure."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'Open-Sora'}", "OMP_NUM_THREADS": "1"}
    programs = folder / ".venv" / "bin"
    environment |= {"PYTHON": str(programs / "python"), "HOME": str(folder)}
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    return subprocess.run(
        ["sh", "-e"], input=command, cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("page", [p for p in PAGES if RUNNABLE.search(read(p))], ids=lambda p: p.stem)
def test_commands_run(page, repository):
    """A page's blocks follow each other in one folder, as a reader types them."""
    for instruction, block in RUNNABLE.findall(read(page)):
        fails = instruction == "fails"
        done = shell(block if fails else f"{instruction}\n{block}", repository)
        assert done.returncode == (2 if fails else 0), f"{block}\n{done.stderr[-3000:]}"


def test_a_wrong_command_is_noticed(repository):
    assert shell("false\ntrue\n", repository).returncode == 1


@pytest.mark.parametrize("page", [p for p in PAGES if SHOWN.search(read(p))], ids=lambda p: p.stem)
def test_files_are_shown_as_they_are(page):
    for name, block in SHOWN.findall(read(page)):
        assert block == read(ROOT / name), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    dead = []
    for target in LINK.findall(CODE.sub("", read(page))):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (fragment and fragment not in anchors(file)):
            dead.append(target)
    assert not dead


def test_the_tables_of_options_are_current():
    page = read(write_options.PAGE)
    assert write_options.with_table(page) == page, "run python scripts/write_options.py"


def test_the_help_of_the_commands_is_current():
    """But for line breaks, which differ between versions of Python."""
    page = read(write_command_line.PAGE)
    assert write_command_line.with_help(page).split() == page.split(), (
        "run python scripts/write_command_line.py"
    )


def test_every_page_is_on_the_site():
    listed = set(re.findall(r": (\S+\.md)$", read(ROOT / "mkdocs.yml"), re.MULTILINE))
    docs = ROOT / "docs"
    assert listed == {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}
