"""Files that appear under their name only when they are whole."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
