"""Write gallery.html into a folder of sampled videos or of an evaluation: scripts/gallery.py FOLDER."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Import this checkout's packages from any working directory, installed or not.
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.cli import exit_code  # noqa: E402
from Core.evaluation.gallery import write_gallery  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="project_dir of a sampling, or the folder of an evaluation")
    flags = parser.parse_args(argv)
    return exit_code(lambda: print(write_gallery(flags.folder)))


if __name__ == "__main__":
    sys.exit(main())
