"""`vader estimate` of this checkout."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]  # this checkout's packages, installed or not

from Core.commands.estimate import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
