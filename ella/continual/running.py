"""One run per folder: a second one is refused for as long as the first lives."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ella.atomic import in_words, make_folder
from ella.locks import Lock

__all__ = ["one_run"]

LOCK = ".ella-run.lock"


@contextmanager
def one_run(folder: str | Path) -> Iterator[None]:
    """Keep ``folder``, made if missing, to this run until the block ends or the process does.

    Raises:
        BlockingIOError: another process, or another thread of this one, is running there.
        OSError: nothing can be written there.
    """
    make_folder(Path(folder))
    path = Path(folder) / LOCK
    lock = _lock(path)
    try:
        with suppress(OSError):  # only what others are told
            os.truncate(lock.descriptor, 0)
            os.write(lock.descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        if lock.is_open:  # not in a forked child: the run is its parent's
            with suppress(OSError):
                path.unlink()
            lock.release()


def _lock(path: Path) -> Lock:
    while True:
        try:
            lock = Lock(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise in_words(f"cannot run in {path.parent}", error) from error
        try:
            lock.acquire(wait=False)
        except BlockingIOError:
            holder = os.read(lock.descriptor, 200).decode(errors="replace") or "a process"
            lock.release()
            raise BlockingIOError(
                f"another process is running here: {holder} has {path}; wait for it, or give another output folder"
            ) from None
        # A run deletes its file as it ends; the lock is then on a file that the next one will not find.
        if lock.is_at(path):
            return lock
        lock.release()
