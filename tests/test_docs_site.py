"""The documentation site: links out of docs/, and pages that fit the screen."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed (requirements-dev.txt)")
pytest.importorskip("material", reason="mkdocs-material is not installed (requirements-dev.txt)")

from scripts import docs_hooks  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://github.com/owner/name.git", "https://github.com/owner/name"),
        ("https://user:secret@github.com/owner/name", "https://github.com/owner/name"),
        ("git@github.com:owner/name.git", "https://github.com/owner/name"),
        ("ssh://git@gitlab.com/owner/name.git", "https://gitlab.com/owner/name"),
        ("/srv/name.git", ""),
        ("", ""),
    ],
)
def test_the_repositorys_address_follows_from_the_remote(remote, address):
    assert docs_hooks.repository_address(remote) == address


@pytest.mark.parametrize(
    ("repository", "code"),
    [("https://x.org/o/n", "[code](https://x.org/o/n/blob/HEAD/Core/cli.py)"), (None, "code")],
)
def test_files_outside_the_site_are_linked_to_in_the_repository(repository, code):
    config = SimpleNamespace(repo_url=repository)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="training.md"))
    text = "[code](../Core/cli.py) and ![picture](../assets/method.svg) and [page](training.md)"
    shown = docs_hooks.on_page_markdown(text, page, config)
    assert shown == f"{code} and ![picture](assets/method.svg) and [page](training.md)"
    page.file.src_uri = "families/wan.md"
    text = "[code](../../Core/cli.py) and [page](../training.md#exporting)"
    assert docs_hooks.on_page_markdown(text, page, config) == f"{code} and [page](../training.md#exporting)"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    return folder


# What a reader would have to guess: the page or its code is cut off, or a table neither fits nor scrolls.
CUT_OFF = """() => {
  const wide = e => e.scrollWidth > e.clientWidth + 1
  const page = document.documentElement
  const code = [...document.querySelectorAll('.md-content pre code')].filter(wide)
  const tables = [...document.querySelectorAll('.md-content table')].filter(t => {
    const frame = t.closest('.md-typeset__scrollwrap')
    return t.scrollWidth > frame.clientWidth && getComputedStyle(frame).overflowX != 'auto'
  })
  return [wide(page) ? 'the page' : '', ...[...code, ...tables].map(e => e.textContent.slice(0, 60))].filter(Boolean)
}"""


@pytest.mark.parametrize("width", [375, 768, 1280])
def test_nothing_is_cut_off(chromium, site, width):
    page = chromium.new_page(viewport={"width": width, "height": 900})
    for name in ("quickstart", "rewards", "config-files"):
        page.goto((site / f"{name}.html").as_uri())
        page.wait_for_selector(".md-typeset__scrollwrap", state="attached")
        assert page.evaluate(CUT_OFF) == []
    page.close()
