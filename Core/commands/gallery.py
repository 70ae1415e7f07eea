"""``vader gallery``: videos of the same prompts and noise side by side, on one page."""

from collections.abc import Sequence
from pathlib import Path

from Core.commands.startup import Parser, importing
from Core.utils.exit_codes import exit_code

HELP = """Writes gallery.html into a folder of sampled videos or of an evaluation: for each prompt and noise the videos
of the base model and of every adapter side by side. Sampling and evaluation do so themselves; do it again after
scoring, or for the folders of several adapters in one folder."""


def main(argv: Sequence[str]) -> int:
    parser = Parser("gallery", HELP)
    parser.add_argument("folder", type=Path, help="project_dir of a sampling, or the folder of an evaluation")
    return exit_code(lambda: gallery(parser.parse_args(argv).folder))


def gallery(folder: Path) -> None:
    with importing():
        from Core.evaluation.gallery import write_gallery

    print(write_gallery(folder))
