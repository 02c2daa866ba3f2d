"""Files and folders written whole or not at all: under a temporary name, flushed to disk, renamed into place."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .locks import one_writer

__all__ = ["in_words", "make_folder", "remove", "replacing", "temporaries", "write_atomically", "write_text_atomically"]


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call ``write`` with a temporary path and put what it wrote in ``path``'s place; returns ``path``.

    A kill at any moment leaves the old file or the new one; an error in ``write`` leaves the old one and nothing else.
    Writers in one folder take turns. What killed writers of this file left is removed.

    Raises:
        OSError: ``path`` cannot be written, whichever library found that out; the message names it.
    """
    path = Path(path)
    with one_writer(path.parent) as alone:
        if alone:
            own = re.compile(temporaries(re.escape(path.name)))
            remove(found for found in path.parent.iterdir() if own.fullmatch(found.name))
        with replacing(path) as temporary:
            write(temporary)
    return path


def write_text_atomically(path: str | Path, text: str) -> Path:
    """:func:`write_atomically` of UTF-8 text; what has no UTF-8, as in odd file names, is written as ``\\udcff``."""
    data = text.encode("utf-8", "backslashreplace")
    return write_atomically(path, lambda temporary: temporary.write_bytes(data))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path of the same name; what the block leaves there, a file or a folder, takes ``path``'s place.

    A folder replaces no folder that holds anything. Raises OSError as :func:`write_atomically` does.
    """
    # A folder of its own: what a library writes beside the file on its way there is removed with it.
    folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir()
        yield folder / path.name
        _flush(folder / path.name)
        os.replace(folder / path.name, path)
    except (OSError, SafetensorError) as error:
        raise in_words(f"cannot write {path}", error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _flush(path.parent)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents where they are missing, and flush what names them."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _flush(path.parent)


def temporaries(name: str) -> str:
    """A regular expression of the temporary names of ``name``, itself one; earlier ones held the process id."""
    return rf"\.{name}\.(\d+|[0-9a-f]{{8}})\.tmp(\.[a-z]+)?"


def remove(paths: Iterable[Path]) -> None:
    """Remove files, and folders with all they hold; what cannot be removed stays."""
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _flush(path: Path) -> None:
    is_folder = path.is_dir()
    if is_folder and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folders
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some file systems have no way to flush a folder, and a folder may be writable but not readable.
        if not (is_folder and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES)):
            raise in_words(f"cannot flush {path} to disk", error) from error


def in_words(what: str, error: Exception) -> OSError:
    """The OSError that says ``what`` failed and why, of the kind that ``error`` stands for, be it a library's own."""
    code = getattr(error, "errno", None)
    if code is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        code = int(found[1])
    reason = str(error) if code is None else os.strerror(code)
    # With one argument its text is without the number.
    failure = type(OSError(code, reason))(f"{what}: {reason}")
    failure.errno = code
    return failure
