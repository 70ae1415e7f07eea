"""What there is to choose from, read from a file that ``scripts/write_catalogue.py`` writes: nothing is imported."""

import functools
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("catalogue.json")


@functools.cache
def catalogue() -> dict[str, Any]:
    """``models`` and ``rewards`` by name, the ``keys`` of configurations, and by command its ``flags``, each with
    whether it takes a value.
    """
    return json.loads(FILE.read_text(encoding="utf-8"))
