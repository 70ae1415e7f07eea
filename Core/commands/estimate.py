"""``vader estimate``: memory and seconds of a run, without its weights and without a GPU."""

from collections.abc import Sequence
from pathlib import Path

from Core.commands.startup import Parser, importing
from Core.utils.exit_codes import exit_code

HELP = """Predicts the peak memory, operations and seconds of a run, phase by phase, without its weights and without a
GPU; says on which cards it fits, and the cheapest settings with which it would. Every key of the config is a flag too.

  vader estimate wan/t2v_1_3b --gpu rtx4090 h100"""


def main(argv: Sequence[str]) -> int:
    parser = Parser("estimate", HELP, "CONFIG [--gpu NAME …] [--processes N] [--json FILE] [flags]")
    parser.add_argument("--gpu", nargs="+", default=[], metavar="NAME", help="cards, such as rtx4090 or h100")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of the run, one per card")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    own, rest = parser.parse_known_args(argv)

    def predict() -> None:
        with importing():
            from Core.estimate.command import estimate

        estimate(rest, own.gpu, own.processes, own.json)

    return exit_code(predict)
