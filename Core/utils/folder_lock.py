"""One process a folder: a lock that the kernel lifts when its owner dies, however it dies."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

logger = logging.getLogger("vader")
LOCK = ".lock"
# The kernel first frees the memory of a process that was killed, and then its locks.
PATIENCE = 5.0  # seconds
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process alone; it is made where it is missing, and waited for where it is held.

    The lock is ``flock`` on the file ``.lock``, which stays there. Linux passes it on to an NFS server, so it holds
    between machines unless the mount says ``nolock`` or ``local_lock``; a server frees the lock of a machine that
    vanished once its lease ends. A file system without locks costs a warning.

    Raises:
        BlockingIOError: another process holds it; the message says which.
        OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        _acquire(file, folder)
        _sign(file)
        yield


def _acquire(file: IO[str], folder: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in NO_LOCKS:
                logger.warning(
                    "%s: its file system has no locks (%s); nothing keeps a second run out", folder, error
                )
                return
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
        if time.monotonic() >= end:
            raise BlockingIOError(f"{str(folder)!r} is in use by {_holder(file)}")
        time.sleep(0.1)


def _sign(file: IO[str]) -> None:
    """Write who holds the lock; on a full disk it is held unsigned."""
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    with suppress(OSError):
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n")
        file.flush()


def _holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        owner = json.loads(file.read())
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # that has not signed, or could not
