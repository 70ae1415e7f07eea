"""What the pages of a run share: look and player (``page.html``), escaping, policy, and which videos may be shown.

A page is one HTML file. Prompts and everything else that a run names enter it as escaped data; the only programs in
it are the scripts of its templates, which its Content-Security-Policy lists by their hashes.
"""

import base64
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from Core.generation.manifest import read_manifest

TEMPLATES = Path(__file__).parent
BASE_TEMPLATE = "page.html"
MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png"}
IN_PAGE = "data:"


def render(template: str, content: Mapping[str, Any], media: str = IN_PAGE, connect: str = "'none'") -> str:
    """The page of a template in this folder.

    Args:
        media: where its videos and pictures come from, as the policy writes it.
        connect: whom its scripts may ask, likewise.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "percent": lambda share: f"{share:.0%}"}
    policy = content_policy(template, media, connect)
    return environment.get_template(template).render(content, policy=policy)


def content_policy(template: str, media: str, connect: str) -> str:
    """Content-Security-Policy of a page: the scripts of its templates by hash, its media, and nothing else."""
    sources = [(TEMPLATES / name).read_text(encoding="utf-8") for name in (BASE_TEMPLATE, template)]
    scripts = [script for source in sources for script in re.findall(r"<script>(.*?)</script>", source, re.S)]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    images = media if IN_PAGE in media else f"{IN_PAGE} {media}"  # the icon is in the page
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src {images}; "
        f"media-src {media}; connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def number(value: float | None, digits: int = 4) -> str:
    """A figure with as many digits as mean something; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 else text


class MadeVideos:
    """The videos inside a folder, wherever links lead, that the ``prompts.jsonl`` beside each of them names."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.named: dict[Path, set[str]] = {}

    def __contains__(self, file: Path) -> bool:
        if file.suffix not in MEDIA_TYPES or not file.resolve().is_relative_to(self.root):
            return False
        if file.parent not in self.named:
            self.named[file.parent] = {entry["file"] for entry in read_manifest(file.parent)}
        return file.name in self.named[file.parent]


def data_uri(content: bytes, suffix: str) -> str:
    return f"{IN_PAGE}{MEDIA_TYPES[suffix]};base64,{base64.b64encode(content).decode()}"


def kind_of_media(file: Path) -> str:
    """``video`` or ``image``, as the templates ask."""
    return MEDIA_TYPES[file.suffix].partition("/")[0]
