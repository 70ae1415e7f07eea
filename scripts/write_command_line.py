"""Write the help of every command to docs/command-line.md: write_command_line.py [--check].

Everything between the two markers is replaced.
"""

import contextlib
import io
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.commands.main import COMMANDS, main  # noqa: E402
from scripts.pages import with_section  # noqa: E402

PAGE = ROOT / "docs" / "command-line.md"
BEGIN, END = "<!-- help: written by scripts/write_command_line.py -->", "<!-- end of help -->"
WIDTH = "100"  # argparse fills the terminal's


def help_of(*words: str) -> str:
    """What ``vader WORDS --help`` prints."""
    said = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):
            main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return said.getvalue().strip()


def with_help(text: str) -> str:
    """``text`` with the help between its markers updated."""
    parts = [f"```text\n{help_of()}\n```"]
    parts += [f"## {name}\n\n```text\n{help_of(name)}\n```" for name in COMMANDS]
    return with_section(text, BEGIN, END, parts)


def update() -> int:
    text = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        return int(with_help(text) != text)
    PAGE.write_text(with_help(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(update())
