"""CSV tables: one row per step, safe against kills, full disks and other hands; and text that is no formula."""

import csv
import errno
import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from Core.utils.files import write_whole

logger = logging.getLogger("vader")
# What a spreadsheet would run, behind any number of the apostrophes that keep it from doing so.
FORMULA = re.compile(r"'*[=+\-@\t\r]")


class CsvTable:
    """A CSV file of numbers with one row per step, on disk row by row; a row with a new column rewrites the file.

    The table is also held in memory: rows that a full disk refuses are written with the next one, and a file that
    was deleted or replaced meanwhile is written again.

    Args:
        resume_step: rows after it belong to steps that will be done again, and are dropped.
    """

    def __init__(self, path: Path, resume_step: int = -1):
        self.path = path
        self.columns: list[str] = []
        self.content = bytearray()
        self._written: tuple[int, int] | None = None  # inode and size of the file as it was left
        if path.is_file():
            rows = [row for row in _sound_rows(path) if int(row["step"]) <= resume_step]
            self._set(list(rows[0]) if rows else [], rows)
            self.save()

    def append(self, row: Mapping[str, Any]) -> None:
        if new := [name for name in row if name not in self.columns]:
            self._set([*self.columns, *new], [*_parse(self.content.decode()), row])
            self._written = None
        else:
            self.content += self._lines([row])
        self.save()

    def save(self) -> None:
        """Bring the file to what the table holds; where that fails, the next row tries again."""
        try:
            self._write()
        except OSError as error:
            logger.warning("%s: %s; its rows are kept until they can be written", self.path, error)

    def _set(self, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
        self.columns = columns
        header = dict(zip(columns, columns, strict=True))
        self.content = bytearray(self._lines([header, *rows]) if columns else b"")

    def _write(self) -> None:
        """Bring the file to ``content``."""
        if self._written and self._written == _mark(self.path):
            self._extend(size=self._written[1])
        else:
            if self._written:
                logger.warning("%s was deleted or changed by something else; it is written again", self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, bytes(self.content))
        self._written = _mark(self.path)

    def _extend(self, size: int) -> None:
        """Append what lies beyond ``size``, in one write, so that a killed run leaves whole lines."""
        lines = self.content[size:]
        try:
            with open(self.path, "ab", buffering=0) as file:
                if file.write(lines) < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.truncate(self.path, size)
            raise

    def _lines(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size


def read_table(path: Path) -> list[dict[str, float]]:
    """Rows of a table of numbers; an empty cell is NaN."""
    rows = _parse(path.read_text(encoding="utf-8"))
    return [{key: float(value or "nan") for key, value in row.items()} for row in rows if _is_whole(row)]


def _parse(text: str) -> list[dict[str, str]]:
    """Rows as text, without a last line that a crash cut short: without its newline it may lack digits."""
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))


def _is_whole(row: Mapping[str, Any]) -> bool:
    return None not in row.values() and None not in row


def _sound_rows(path: Path) -> list[dict[str, str]]:
    """Rows that are whole and hold numbers. Says which are not, and keeps the file that holds them."""
    content = path.read_bytes()
    header, *lines = content.decode(errors="replace").split("\n")[:-1] or [""]
    rows = {number: _sound_row(header, line) for number, line in enumerate(lines, 2)}
    if damaged := [str(number) for number, row in rows.items() if not row]:
        kept = path.with_name(f"{path.name}.damaged")
        with suppress(OSError):
            write_whole(kept, content)
        listed = ", ".join(damaged[:10]) + (", …" if len(damaged) > 10 else "")
        logger.warning(
            "%s: %d of %d rows cannot be read and are left out (lines %s); the file is kept as %s",
            path, len(damaged), len(rows), listed, kept.name,
        )  # fmt: skip
    return [row for row in rows.values() if row]


def _sound_row(header: str, line: str) -> dict[str, str]:
    """The row on a line; empty where it lacks a cell, its step, or one is no number."""
    try:
        (row,) = _parse(f"{header}\n{line}\n")
        [int(row["step"]), *(float(cell) for cell in row.values() if cell)]
    except (KeyError, TypeError, ValueError, csv.Error):
        return {}
    # Numbers are never quoted; an open quote would take in the next line.
    return row if _is_whole(row) and '"' not in line else {}


def inert(cell: Any) -> Any:
    """Text that a spreadsheet would run as a formula, behind an apostrophe; numbers and other text as they are."""
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) and not _is_number(cell) else cell


def read_text_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a table of text, without the apostrophes of ``inert``."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return [{key: _as_given(cell) for key, cell in row.items()} for row in csv.DictReader(file)]


def _as_given(cell: Any) -> Any:
    return cell[1:] if isinstance(cell, str) and cell.startswith("'") and FORMULA.match(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
