"""Write report.html into a run or evaluation folder: scripts/report.py RUN."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Import this checkout's packages from any working directory, installed or not.
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.cli import exit_code  # noqa: E402
from Core.evaluation.report import write_report  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder with metrics.csv, evaluation.json, or both")
    print(write_report(parser.parse_args().run))


if __name__ == "__main__":
    sys.exit(exit_code(main))
