"""Where the files that ship with the project lie: configs, prompts, the demo."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]  # Core
# Of a wheel: the parts of the repository outside Core, at the same paths. setup.py puts them there.
BUNDLE = PACKAGE / "checkout"


def home() -> Path:
    """The folder that the repository's paths start from: the checkout, or what the wheel brought of it."""
    return BUNDLE if BUNDLE.is_dir() else PACKAGE.parent
