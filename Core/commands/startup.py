"""What the commands do around their work: show that something happens, refuse, end."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from Core.utils.process import quiet_interrupt
from Core.utils.terminal import status


@contextmanager
def importing(shown: bool = True) -> Iterator[None]:
    """Around the imports that take seconds: it shows that they do, and Ctrl-C ends them in one sentence."""
    with quiet_interrupt(), status("loading PyTorch …", shown and "torch" not in sys.modules):
        from Core.backbones.own_opensora import prefer_copy_to_other_versions

        prefer_copy_to_other_versions()
        yield


class Parser(argparse.ArgumentParser):
    """argparse whose help keeps the lines of its description, and whose error is one sentence.

    Args:
        arguments: what the usage shows, where argparse would show every flag.
    """

    def __init__(self, command: str, description: str, arguments: str = ""):
        super().__init__(
            prog=f"vader {command}",
            usage=f"vader {command} {arguments}" if arguments else None,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Exit with 2 after one sentence."""
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")
