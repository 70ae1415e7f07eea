"""Faults of a disk, raised by the calls that write to it."""

import builtins
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

DELETED = "deleted"
FAULTS = ("ENOSPC", "EDQUOT", "EROFS", DELETED)
CALLS = [(os, name) for name in ("rename", "replace", "mkdir", "fsync")]
CALLS += [(Path, "write_bytes"), (Path, "write_text"), (builtins, "open")]


@contextmanager
def failing_disk(fault: str, number: int, folder: Path, lasting: bool = True) -> Iterator[list[str]]:
    """Within this context the call with this number fails, and if ``lasting`` all that follow; yields which did.

    Args:
        fault: name of an error; ``deleted`` removes ``folder`` at the call instead, once.
    """
    failed: list[str] = []
    calls = iter(range(number))

    def disturbed(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            if name == "open" and "r" in (*args[1:2], kwargs.get("mode", "r"))[0]:
                return function(*args, **kwargs)
            if next(calls, None) is None and (not failed or (lasting and fault != DELETED)):
                failed.append(name)
                _fail(fault, folder, name, function, args)
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, name in CALLS:
            patched = disturbed(name, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, patched))
        yield failed


def _fail(fault: str, folder: Path, name: str, function: Callable, args: tuple) -> None:
    if fault == DELETED:
        shutil.rmtree(folder, ignore_errors=True)
        return
    if name == "write_bytes" and fault != "EROFS":
        path, content = args
        function(path, content[: len(content) // 2])
    number = getattr(errno, fault)
    raise OSError(number, os.strerror(number))
