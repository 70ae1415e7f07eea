"""mkdocs hooks: links that leave docs/ (pictures are included; source files are linked to in the repository, or are
plain text where its address is not known), and the link to the repository itself."""

import re
import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#\s]+)[^)]*\)")
PICTURES = (".png", ".svg", ".jpg", ".webp")
SSH_REMOTE = re.compile(r"(?:ssh://)?git@([^:/]+)[:/](.+)")


def repository_address(remote: str) -> str:
    """The web address of a git remote; '' for one that has none, such as a folder."""
    if ssh := SSH_REMOTE.fullmatch(remote):
        remote = f"https://{ssh[1]}/{ssh[2]}"
    # A remote may hold a name and a password.
    address = re.sub(r"^(https?://)[^/@]*@", r"\1", remote)
    return address.removesuffix("/").removesuffix(".git") if address.startswith("https://") else ""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link to the repository that the checkout was cloned from."""
    asked = subprocess.run(
        ["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    config.repo_url = repository_address(asked.stdout.strip()) or None
    config.repo_name = config.repo_url and config.repo_url.partition("://")[2].partition("/")[2]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pictures that pages use from elsewhere in the repository."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        for _, _, target in OUTSIDE.findall(page.read_text(encoding="utf-8")):
            if target.endswith(PICTURES) and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **kwargs) -> str:
    """Point links at these pictures, and links to other files outside the site at the repository."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def elsewhere(link: re.Match) -> str:
        mark, text, target = link.groups()
        file = (folder.parent / target).resolve()
        if file.is_relative_to(ROOT / "docs"):  # of a page in a folder
            return link[0]
        if target.endswith(PICTURES):
            return f"{mark}[{text}]({target})"
        address = f"{config.repo_url}/blob/HEAD/{file.relative_to(ROOT)}"
        return f"[{text}]({address})" if config.repo_url else text

    return OUTSIDE.sub(elsewhere, markdown)
