"""``vader COMMAND``: the table of commands, of which only the one that is asked for is imported."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from Core import __version__
from Core.utils.exit_codes import answer
from Core.utils.registry import did_you_mean


class Command(NamedTuple):
    """A line of the help, and the ``module:function`` that takes the words after the command and gives an exit code.

    Its module imports PyTorch, if at all, inside functions: ``--help`` and slips are answered at once.
    """

    summary: str
    function: str


# A new command is one file and one line here.
COMMANDS = {
    "quickstart": Command("train the demo and show it before and after", "Core.commands.quickstart:main"),
    "train": Command("train an adapter", "Core.commands.run:train"),
    "sample": Command("generate videos, with adapters or without", "Core.commands.run:sample"),
    "evaluate": Command("compare adapters with their base model", "Core.commands.evaluate:main"),
    "score": Command("score a folder of videos", "Core.commands.score:main"),
    "watch": Command("serve the page of a run while it trains", "Core.commands.watch:main"),
    "gallery": Command("write the page that shows videos side by side", "Core.commands.gallery:main"),
    "report": Command("write the page of a run or an evaluation", "Core.commands.report:main"),
    "export": Command("write an adapter in another format", "Core.commands.export:main"),
    "check": Command("find what would stop a run, before it loads a model", "Core.commands.run:check"),
    "estimate": Command("predict memory and seconds of a run", "Core.commands.estimate:main"),
    "download": Command("list or fetch weights", "Core.commands.download:main"),
    "models": Command("list the models that can be trained", "Core.commands.listing:models"),
    "rewards": Command("list the rewards that ship", "Core.commands.listing:rewards"),
    "init": Command("write a config for a model, a reward and a GPU", "Core.commands.init:main"),
    "completion": Command("print the shell's completion script", "Core.commands.completion:main"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``COMMAND [arguments]``; returns the exit code."""
    try:
        return dispatch(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # its reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def dispatch(words: list[str]) -> int:
    """What the words ask for, done; the exit code."""
    if words[:1] == ["help"] and words[1:]:
        words = [words[1], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"vader {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        meant = did_you_mean(name, COMMANDS) or "`vader --help` lists the commands"
        return answer(2, [f"there is no command {name!r}: {meant}"])
    module, _, function = COMMANDS[name].function.partition(":")
    return getattr(importlib.import_module(module), function)(rest)


def usage() -> str:
    """The help of ``vader`` itself."""
    lines = [f"  {name:<11} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vader COMMAND …",
            "",
            "Aligns text-to-video models with reward gradients.",
            "",
            *lines,
            "",
            "`vader COMMAND --help` describes a command, `vader --version` prints the version.",
        ]
    )
