"""Show a run's page while it trains, on this machine alone: scripts/watch.py RUN [--port N]."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Import this checkout's packages from any working directory, installed or not.
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.cli import exit_code  # noqa: E402
from Core.evaluation.watch import PORT, watch  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--port", type=int, default=PORT, help=f"default {PORT}; 0 takes any that is free")
    flags = parser.parse_args(argv)
    return exit_code(lambda: watch(flags.run, flags.port))


if __name__ == "__main__":
    sys.exit(main())
