"""Work given to several processes, each of which may die without the others."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

__all__ = ["Failure", "in_processes", "prepare_process"]


@dataclass(frozen=True)
class Failure:
    """An error as text, from whichever process; ``code`` is an OSError's number."""

    error: str
    traceback: str
    code: int | None = None

    @classmethod
    def of(cls, error: Exception) -> Failure:
        told = str(error) or type(error).__name__
        return cls(told, "".join(traceback.format_exception(error)), getattr(error, "errno", None))


def prepare_process(threads: int | None = None) -> None:
    """What a process that does nothing but streams sets: libraries speak of results only, ``threads`` of a CPU."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # PEFT's call of an older transformers name: nothing that a user of the command can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.showwarning = _said_once(warnings.showwarning)
    if threads:
        torch.set_num_threads(threads)


def _said_once(show: Callable[..., None]) -> Callable[..., None]:
    """``show``, but what streams say is said once and in a line: each method reads the same texts."""
    said: set[str] = set()

    def showwarning(message: Any, category: type, filename: str, lineno: int, *more: Any, **options: Any) -> None:
        if not Path(filename).is_relative_to(Path(__file__).parent):
            show(message, category, filename, lineno, *more, **options)
        elif str(message) not in said:
            said.add(str(message))
            print(message, file=sys.stderr)

    return showwarning


def in_processes(
    make: Callable[..., Callable[[Any], Any]], shared: Sequence[Any], items: Iterable[Any], n: int
) -> Generator[tuple[int, Any]]:
    """Yields ``(i, make(*shared)(item i))`` for all items as they are done, or (i, :class:`Failure`).

    ``make``, ``shared`` and what goes in and out is pickled; ``make(*shared)`` is called once in each of at most ``n``
    new processes. An item is drawn when a process is free for it. A process that dies fails the item it had and is
    replaced. Processes end with this one, however it ends, and when the iterator is closed; Ctrl-C is this one's alone.
    """
    numbered = enumerate(items)
    busy: dict[Connection, tuple[Any, int]] = {}

    def give(connection: Connection, *messages: Any) -> None:
        with suppress(OSError):  # it has died, which is found in receiving
            for message in messages:
                connection.send(message)

    def start(items: Sequence[tuple[int, Any]]) -> None:
        opened = [_start() for _ in items]  # all at once: the first message is taken when a process has begun
        busy.update((opened[k][0], (opened[k][1], items[k][0])) for k in range(len(items)))
        for (connection, _), (_, item) in zip(opened, items, strict=True):
            give(connection, (make, tuple(shared)), item)

    try:
        start(list(islice(numbered, n)))
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                process, index = busy[ready]
                died = False
                try:
                    answer = ready.recv()
                except (EOFError, OSError):
                    process.join()
                    died, answer = True, Failure(f"its process ended ({_how(process.exitcode)})", "")
                yield index, answer
                del busy[ready]
                item = next(numbered, None)
                if item is not None and not died:
                    busy[ready] = process, item[0]
                    give(ready, item[1])
                    continue
                ready.close()
                process.join()
                if item is not None:
                    start([item])
    finally:
        for process, _ in busy.values():
            process.terminate()
        for connection, (process, _) in busy.items():
            connection.close()
            process.join()


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}; SIGKILL is how the system takes memory back"
    return f"exit status {code}"


def _start() -> tuple[Connection, Any]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    with _no_interrupts():
        process.start()
    there.close()
    return here, process


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal; one started in the block is not interrupted, ever."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # As in the command line: before anything imports PEFT.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    work: Callable[[Any], Any] | Failure
    try:
        make, shared = connection.recv()
        work = make(*shared)
    except EOFError:
        return
    except Exception as error:
        work = Failure.of(error)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            answer = work if isinstance(work, Failure) else work(item)
        except Exception as error:
            answer = Failure.of(error)
        connection.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # What a run writes is whole at any moment.
    os._exit(1)
