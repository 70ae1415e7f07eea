"""CSV tables with one row per step, safe against kills and full disks."""

import csv
import errno
import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from Core.utils.files import write_whole

logger = logging.getLogger("vader")


class CsvTable:
    """A CSV file with one row per step, flushed row by row; a row with a new column rewrites the file.

    A row that a full disk refuses is kept and written with the next one.

    Args:
        resume_step: rows after it belong to steps that will be done again, and are dropped.
    """

    def __init__(self, path: Path, resume_step: int = -1):
        self.path = path
        self.columns: list[str] = []
        self.waiting: list[Mapping[str, Any]] = []
        if path.is_file():
            rows = [row for row in _complete_rows(path) if int(row["step"]) <= resume_step]
            self.columns = list(rows[0]) if rows else []
            self._rewrite(rows)

    def append(self, row: Mapping[str, Any]) -> None:
        self.waiting.append(row)
        try:
            self._write_waiting()
        except OSError as error:
            logger.warning("%s: %s; its rows are kept until they can be written", self.path, error)
            return
        self.waiting.clear()

    def _write_waiting(self) -> None:
        new = [
            name for name in dict.fromkeys(n for row in self.waiting for n in row) if name not in self.columns
        ]
        if new:
            before = _complete_rows(self.path) if self.columns else []
            self.columns = [*self.columns, *new]
            self._rewrite([*before, *self.waiting])
            return
        # One write for all, so that a killed run leaves whole lines; what a full disk cut short is taken back.
        size, lines = self.path.stat().st_size, self._lines(self.waiting)
        try:
            with open(self.path, "ab", buffering=0) as file:
                if file.write(lines) < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.truncate(self.path, size)
            raise

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        header = dict(zip(self.columns, self.columns, strict=True))
        write_whole(self.path, self._lines([header, *rows]) if self.columns else b"")

    def _lines(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()


def read_table(path: Path) -> list[dict[str, float]]:
    """Rows of a table of numbers; an empty cell is NaN."""
    return [{key: float(value or "nan") for key, value in row.items()} for row in _complete_rows(path)]


def _complete_rows(path: Path) -> list[dict[str, str]]:
    """Rows as text, without a last line that a crash cut short."""
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    # Without its newline a last line may lack digits.
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(whole)) if None not in row.values() and None not in row]
