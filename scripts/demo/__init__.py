"""The demo world: captioned videos of moving shapes, an oracle that reads them, and pretraining of its models."""

import sys
from pathlib import Path

# Make `opensora` importable without installing it.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "Open-Sora"))
