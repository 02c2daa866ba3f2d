"""One writer at a time: locks that end with their process, whether it ends well or is killed.

Where the system has none (Windows, some network file systems) work goes on without: writes stay whole or absent, and
whoever starts several processes in one folder is warned.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

try:
    import fcntl
except ImportError:
    fcntl = cast("Any", None)

__all__ = ["Lock", "one_writer"]


class Lock:
    """An exclusive ``flock`` on a file or folder, opened with ``flags``. A forked child does not inherit it."""

    def __init__(self, path: str | Path, flags: int) -> None:
        self.descriptor = os.open(path, flags, 0o644)
        _drop_in_children()
        _open.add(self)

    @property
    def is_open(self) -> bool:
        """False after :meth:`release`, and in a forked child."""
        return self in _open

    def is_at(self, path: str | Path) -> bool:
        """Whether what is locked is still what lies at ``path``."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False

    def acquire(self, *, wait: bool) -> bool:
        """Whether the lock is held now: not where the system has none.

        Raises BlockingIOError if another thread or process holds it and ``wait`` is False.
        """
        try:
            if fcntl is None:
                raise OSError("this platform has no flock")
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            warnings.warn(f"no lock while writing, {error}: let one process at a time write there", stacklevel=3)
            return False
        return True

    def release(self) -> None:
        """Unlock and close; nothing where that is done already."""
        if self.is_open:
            _open.discard(self)
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)


@contextmanager
def one_writer(folder: str | Path) -> Iterator[bool]:
    """Wait until no other thread or process writes in ``folder``, and keep it so until the block ends.

    The lock is on the folder itself, so no file is left. A thread that holds it may enter again. Yields whether the
    lock is held: not where there is none, nor on a folder that is missing or unreadable (the write will say so).
    """
    lock = identity = None
    with suppress(OSError):
        status = os.stat(folder)
        identity = status.st_dev, status.st_ino
        lock = None if identity in _entered.folders else Lock(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    if lock is None or identity is None:
        yield identity in _entered.folders
        return
    try:
        held = lock.acquire(wait=True)
        if held:
            _entered.folders.add(identity)
        yield held
    finally:
        _entered.folders.discard(identity)
        lock.release()


class _Entered(threading.local):
    def __init__(self) -> None:
        self.folders: set[tuple[int, int]] = set()


_entered = _Entered()
_open: set[Lock] = set()


@cache
def _drop_in_children() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_drop)


def _drop() -> None:
    # Closed, not unlocked: the lock belongs to the open file, which the parent still has.
    for lock in _open:
        os.close(lock.descriptor)
    _open.clear()
    _entered.folders.clear()
