"""``vader quickstart``: the demo, which is no part of the package, from the checkout or what the wheel holds of it."""

import importlib
import sys
from collections.abc import Sequence

from Core.commands.startup import importing
from Core.utils.exit_codes import answer, exit_code
from Core.utils.places import home

HELP = """usage: vader quickstart [--prompts N] [flags]

Trains the demo with reward gradients, compares it with the base model on N held-out captions (default 256), and writes
pictures, videos and a report to runs/quickstart in the current directory. It takes minutes on two CPU cores and needs
no download. Every key of its config, vader_quickstart, is a flag too."""


def main(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(HELP)
        return 0
    if not (home() / "scripts" / "demo").is_dir():
        return answer(2, [f"the demo is not part of {home()}; install VADER, or run its checkout"])
    with importing():
        sys.path.insert(0, str(home()))
        demo = importlib.import_module("scripts.demo.quickstart")
    codes: list[int] = []
    return exit_code(lambda: codes.append(demo.main(argv))) or codes[0]
