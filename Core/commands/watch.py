"""``vader watch``: a run's page while it trains."""

from collections.abc import Sequence
from pathlib import Path

from Core.commands.startup import Parser, importing
from Core.utils.exit_codes import exit_code

HELP = """Serves the page of a run on this machine alone while the run trains; the page refreshes itself. Ctrl-C ends
the server and leaves the run alone."""


def main(argv: Sequence[str]) -> int:
    parser = Parser("watch", HELP)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--port", type=int, default=8421, help="default 8421; 0 takes any that is free")
    args = parser.parse_args(argv)

    def serve() -> None:
        with importing():
            from Core.evaluation.watch import watch

        watch(args.run, args.port)

    return exit_code(serve)
