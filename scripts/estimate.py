"""Estimate a run without its weights and without a GPU: `python scripts/estimate.py CONFIG [--gpu NAME …] [flags]`.

Prints peak bytes, operations and seconds of each phase, what fits, and the cheapest settings that would make it fit.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.cli import exit_code  # noqa: E402
from Core.estimate.command import estimate  # noqa: E402

if __name__ == "__main__":
    sys.exit(exit_code(lambda: estimate(sys.argv[1:])))
