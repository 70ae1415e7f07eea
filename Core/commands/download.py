"""``vader download``: the published weights that a model, a reward or a config needs."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from Core.commands.startup import Parser, importing
from Core.utils.exit_codes import exit_code

HELP = """Downloads the published weights that a model, a reward or a config needs, and prints the config lines to use.

  vader download --config vader_train --list
  vader download --reward hps aesthetic --to weights

Without --to, files go to the huggingface_hub and torch caches, where training finds them. Interrupted downloads
resume; complete files are not downloaded again."""


def main(argv: Sequence[str]) -> int:
    parser = Parser("download", HELP)
    parser.add_argument(
        "--model", nargs="+", default=[], metavar="FAMILY", help="model families, as in `backbone`"
    )
    parser.add_argument("--reward", nargs="+", default=[], metavar="NAME", help="see `vader rewards`")
    parser.add_argument("--config", metavar="CONFIG", help="everything this config needs")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder to download to")
    parser.add_argument("--list", action="store_true", help="only list the weights and their sizes")
    flags = parser.parse_args(argv)
    if not (flags.model or flags.reward or flags.config):
        parser.error("nothing to download: give --model, --reward or --config")
    return exit_code(lambda: download(flags))


def download(flags: Namespace) -> None:
    """List the weights, and fetch them unless only the list is wanted.

    Raises:
        ValueError, FileNotFoundError: no such model, reward or config, or weights that cannot be had.
    """
    with importing():
        from Core.needs import config_lines, config_needs, listing, model_needs, reward_needs
        from Core.utils.hub import prefetch

    needs = [need for family in flags.model for need in model_needs(family)]
    needs += [need for name in flags.reward for need in reward_needs(name, {})]
    needs += config_needs(flags.config) if flags.config else []
    print(listing(needs), flush=True)
    if not flags.list:
        paths = prefetch([need.weight for need in needs], flags.to and flags.to.absolute())
        print(f"\n{config_lines(needs, paths)}")
