"""Files and folders that appear under their name only when they are whole."""

import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
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
    """A hidden path beside ``path`` to write to; it takes the place of ``path`` unless the block raises.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    # Machines that share a folder may write the same file at once.
    partial = path.with_name(f".{path.stem}.{socket.gethostname()}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        partial.chmod(_ordinary_mode())
        os.replace(partial, path)
    except OSError as error:
        if _is_of(error, partial):
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _is_of(error: OSError, path: Path) -> bool:
    """Whether an error is of ``path`` or what is below it."""
    if error.filename is None:
        return error.errno in OF_DISKS  # a write to an open file fails without a name
    return Path(str(error.filename)).is_relative_to(path)


def _ordinary_mode() -> int:
    """Permissions of a file as ``open`` makes it; some libraries give theirs to its owner alone."""
    umask = os.umask(0o077)  # it is only told when it is set
    os.umask(umask)
    return 0o666 & ~umask


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one go; text as UTF-8, with what is no text, as in some paths, escaped."""
    with replacing(path) as partial:
        partial.write_bytes(
            content.encode(errors="backslashreplace") if isinstance(content, str) else content
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError, ValueError: it cannot be read, is damaged, or is something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} instead of an object")
    return content


def hidden(folder: Path, state: str) -> Path:
    """Name of a folder that is not (``partial``), or no longer (``replaced``, ``removed``), to be used."""
    return folder.with_name(f".{folder.name}.{state}")


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A hidden, empty folder beside ``folder`` to write to; it takes the place of ``folder`` unless the block raises.

    What it holds survives a power cut from then on. Until then an older ``folder`` stays as it is; after a crash
    between two renames it lies under ``hidden(folder, "replaced")``.

    Raises:
        OSError: the disk is full or not writable, or the folder was deleted meanwhile.
    """
    partial = hidden(folder, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            if path.is_file():
                path.chmod(_ordinary_mode())
            _sync(path)
        _swap(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and _is_of(error, partial):
            raise type(error)(error.errno, error.strerror, str(folder)) from error
        raise


def _swap(partial: Path, folder: Path) -> None:
    replaced = hidden(folder, "replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    try:
        partial.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "it was deleted while it was written", str(folder))


def _sync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
