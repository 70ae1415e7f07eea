"""Write the table of config keys to docs/options.md: write_options.py [--check]."""

import sys
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.backbones import BACKBONES  # noqa: E402
from Core.config.schema import sections_of  # noqa: E402
from Core.training.objectives import OBJECTIVES  # noqa: E402
from Core.utils.options import default_of, describe_type  # noqa: E402
from Core.utils.registry import Registry  # noqa: E402
from scripts.pages import with_section  # noqa: E402

PAGE = ROOT / "docs" / "options.md"
# Sections that the value of a key chooses, with what there is to choose from.
OTHERS: dict[str, Registry] = {"family": BACKBONES, "objective": OBJECTIVES}
TITLES = {"family": "family: opensora", "objective": "objective: reward_gradient"}
BEGIN, END = "<!-- options: written by scripts/write_options.py -->", "<!-- end of options -->"


def table() -> str:
    """A Markdown row per key, under a row per section: name, default, type, what it does."""
    rows = ["| key | default | type | meaning |", "| --- | --- | --- | --- |"]
    for section, schema in sections_of({}).items():
        rows += section_rows(TITLES.get(section, section), fields(schema))
        if section in OTHERS:
            rows += others(section, OTHERS[section], fields(schema))
    return "\n".join(rows)


def section_rows(title: str, entries: Sequence[Field]) -> list[str]:
    rows = [f"| **{title}** | | | |"]
    for entry in entries:
        cells = (
            f"`{entry.name}`",
            f"`{default_of(entry)!r}`",
            describe_type(entry.type),
            entry.metadata["doc"],
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def others(section: str, table: Registry, shown: Sequence[Field]) -> list[str]:
    """Sections of the other entries of a registry: each key where it comes first, by name where it is shown already."""
    rows, shown = [], list(shown)
    for name in list(table)[1:]:
        entries = fields(table.resolve(name).settings_class)
        shared = ", ".join(f"`{entry.name}`" for entry in entries if entry in shown)
        own = [entry for entry in entries if entry not in shown]
        rows += section_rows(f"{section}: {name}" + (f", which also has {shared}" if shared else ""), own)
        shown += own
    return rows


def with_table(text: str) -> str:
    """``text`` with the table between its markers updated."""
    return with_section(text, BEGIN, END, [table()])


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        return int(with_table(text) != text)
    PAGE.write_text(with_table(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
