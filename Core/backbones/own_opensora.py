"""Which package ``import opensora`` finds.

A wheel holds this project's copy inside ``Core``, so that it takes nobody's place in site-packages. An installed
``opensora`` comes first: upstream's version 1.2 is used as it is. Another version has not the modules that are needed;
the ``vader`` command then uses the copy in its own process, and elsewhere the other version stays what is found.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from Core.utils.places import home

NAME = "opensora"
OF_1_2 = "models/stdit/stdit3.py"  # neither older nor newer versions have it under this path


class OwnCopy(MetaPathFinder):
    """Finds the copy of this checkout or wheel."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        init = home() / "Open-Sora" / NAME / "__init__.py"
        if fullname != NAME or not init.is_file():
            return None
        return importlib.util.spec_from_file_location(
            NAME, init, submodule_search_locations=[str(init.parent)]
        )


OWN = OwnCopy()


def offer_copy() -> None:
    """Have the copy found where no other ``opensora`` is."""
    if OWN not in sys.meta_path:
        sys.meta_path.append(OWN)


def prefer_copy_to_other_versions() -> None:
    """Have the copy found in this process unless an ``opensora`` 1.2 is installed or imported."""
    offer_copy()
    found = importlib.util.find_spec(NAME)
    places = map(Path, found.submodule_search_locations or () if found else ())
    if not any((place / OF_1_2).is_file() for place in places):
        sys.meta_path.remove(OWN)
        sys.meta_path.insert(0, OWN)
