"""The demo world: captioned videos of moving shapes, an oracle that reads them, and the pretraining of its models."""

import sys
from pathlib import Path

# `opensora` is importable without being installed, as everywhere else in a checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "Open-Sora"))
