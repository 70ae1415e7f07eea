"""``vader report``: the page of a run or an evaluation."""

from collections.abc import Sequence
from pathlib import Path

from Core.commands.startup import Parser, importing
from Core.utils.exit_codes import exit_code

HELP = "Writes report.html into the folder of a run or of an evaluation: curves, videos, tables, on one page."


def main(argv: Sequence[str]) -> int:
    parser = Parser("report", HELP)
    parser.add_argument("run", type=Path, help="folder with metrics.csv, evaluation.json, or both")
    return exit_code(lambda: report(parser.parse_args(argv).run))


def report(folder: Path) -> None:
    with importing():
        from Core.evaluation.report import write_report

    print(write_report(folder))
