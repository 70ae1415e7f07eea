"""What pyproject.toml cannot say: the parts of the repository outside Core that a wheel brings along."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
BUNDLE = "Core/checkout"  # Core/utils/places.py finds it there
PARTS = (
    "Open-Sora/opensora",
    "Open-Sora/configs",
    "assets/demo",
    "assets/prompts",
    "configs",
    "scripts/demo",
)


class BuildWithParts(build_py):
    """Copies the parts into the package at their own paths, so that what names one finds it as in a checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # they are found where they are
            return
        bundle = Path(self.build_lib, BUNDLE)
        shutil.rmtree(bundle, ignore_errors=True)  # of an earlier build
        for part in PARTS:
            shutil.copytree(ROOT / part, bundle / part, ignore=shutil.ignore_patterns("__pycache__"))
        # As a package it is found before a folder of the user's that is named so too.
        (bundle / "scripts" / "__init__.py").touch()

    def get_source_files(self) -> list[str]:
        """For the source distribution, which wheels are built of as well."""
        files = (file for part in PARTS for file in (ROOT / part).rglob("*") if file.is_file())
        kept = (file for file in files if "__pycache__" not in file.parts)
        return [*super().get_source_files(), *(str(file.relative_to(ROOT)) for file in kept)]


setup(cmdclass={"build_py": BuildWithParts})
