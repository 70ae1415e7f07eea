"""Files that appear under their name only when they are whole."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME_BYTES, PATH_BYTES = 255, 4095  # of Linux's file systems


def path_fault(text: str) -> str:
    """Why no file can be named ``text``, in words; empty where one can."""
    if not text.strip():
        return "a path must not be empty"
    if "\0" in text:
        return "a path cannot hold a null character"
    try:
        path = Path(text).expanduser()
        sizes = [len(os.fsencode(part)) for part in path.parts]
    except RuntimeError:
        return f"there is no user {Path(text).parts[0][1:]!r} on this machine; write the folder out"
    except UnicodeEncodeError:
        return "a path cannot hold characters that are no Unicode text"
    if max(sizes, default=0) > NAME_BYTES or sum(sizes) + len(sizes) > PATH_BYTES:
        return f"a path has at most {NAME_BYTES} bytes between slashes and {PATH_BYTES} in all; shorten it"
    return ""


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: it cannot be read, is damaged, or holds something else; the message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # a folder; no JSON, or no UTF-8
        raise ValueError(
            f"{path} is no JSON or is damaged ({type(error).__name__}); fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}; fetch it again")
    return content


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside ``path`` to write to; it takes the place of ``path`` unless the block raises."""
    # Machines that share a folder may write the same file at once.
    partial = path.with_name(f".{path.stem}.{socket.gethostname()}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one go; text as UTF-8."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
