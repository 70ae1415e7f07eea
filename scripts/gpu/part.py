"""The process of one part: `python -m scripts.gpu.part NAME FILE [--small]` writes what it measures to FILE."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from Core.utils.files import write_whole
from scripts.gpu.parts import BY_NAME


class Report:
    """Results in a file, which is whole after every ``add``: a part that is stopped keeps them."""

    def __init__(self, file: Path):
        self.file, self.values = file, {}

    def add(self, **values: Any) -> None:
        self.values |= values
        write_whole(self.file, json.dumps(self.values))


def main(argv: list[str]) -> None:
    name, file, *flags = argv
    part = BY_NAME[name]
    module, _, function = part.function.partition(":")
    run = getattr(importlib.import_module(f"scripts.gpu.{module}"), function)
    run(Report(Path(file)), flags == ["--small"], *part.arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
