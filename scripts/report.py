"""Write report.html into the folder of a run or of an evaluation: scripts/report.py RUN."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The packages of this checkout, wherever the script is started and whether or not they are installed.
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.cli import exit_code  # noqa: E402
from Core.evaluation.report import write_report  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder with metrics.csv, evaluation.json, or both")
    print(write_report(parser.parse_args().run))


if __name__ == "__main__":
    sys.exit(exit_code(main))
