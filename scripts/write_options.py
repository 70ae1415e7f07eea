"""Write the table of config keys to README.md and docs/options.md: write_options.py [--check]."""

import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.config.schema import Config  # noqa: E402
from Core.utils.options import default_of, describe_type  # noqa: E402

PAGES = (ROOT / "README.md", ROOT / "docs" / "options.md")
BEGIN, END = "<!-- options: written by scripts/write_options.py -->", "<!-- end of options -->"


def table() -> str:
    """Markdown table with one row per key: name, default, type, meaning."""
    rows = ["| key | default | type | meaning |", "| --- | --- | --- | --- |"]
    for entry in fields(Config):
        cells = (
            f"`{entry.name}`",
            f"`{default_of(entry)!r}`",
            describe_type(entry.type),
            entry.metadata["doc"],
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """``text`` with the table between its markers updated."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main() -> int:
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    if "--check" in sys.argv:
        return int(any(with_table(text) != text for text in texts.values()))
    for page, text in texts.items():
        page.write_text(with_table(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
