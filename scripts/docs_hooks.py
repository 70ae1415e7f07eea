"""mkdocs hooks for links that leave docs/: include pictures, turn links to source files into plain text."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#\s]+)[^)]*\)")
PICTURES = (".png", ".svg", ".jpg")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pictures that pages use from elsewhere in the repository."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        for _, _, target in OUTSIDE.findall(page.read_text(encoding="utf-8")):
            if target.endswith(PICTURES) and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Point links at these pictures, and drop links to files outside the site."""
    return OUTSIDE.sub(
        lambda m: f"{m[1]}[{m[2]}]({m[3]})" if m[3].endswith(PICTURES) else m[2],
        markdown,
    )
