"""``vader estimate``: memory and seconds of a run, without its weights and without a GPU."""

from collections.abc import Sequence

from Core.commands.startup import importing
from Core.utils.exit_codes import exit_code


def main(argv: Sequence[str]) -> int:
    def predict() -> None:
        with importing():
            from Core.estimate.command import estimate

        estimate(argv)

    return exit_code(predict)
