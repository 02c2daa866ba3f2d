"""Processes for tests, forked from one that has imported everything and done nothing: an import takes ten seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
import warnings

import pytest

PRELOADED = ["tests.distributed.trainers", "tests.distributed.options", "tests.distributed.loops", "deepspeed"]
# deepspeed looks for an accelerator when it is imported.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def started(log, target, *arguments):
    """A process that calls a function of a module with arguments that pickle; what it prints is in the file ``log``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_called, args=(str(log), target, *arguments))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        process.start()
    return process


def called(log, target, *arguments, timeout=300):
    """Wait for such a process; RuntimeError with what it wrote where it fails or takes longer than ``timeout`` s."""
    process = started(log, target, *arguments)
    process.join(timeout)
    killed(process)
    if process.exitcode:
        raise RuntimeError(f"ended with {process.exitcode} after {timeout} s at most and wrote:\n{tail(log)}")


def killed(process):
    process.kill()
    process.join()
    return process.exitcode


def tail(log):
    return log.read_text()[-6000:] if log.exists() else "nothing"


def _called(log, target, *arguments):
    file = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    warnings.simplefilter("ignore")
    try:
        target(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        # Without what else would run first: other processes may be waiting for this one.
        os._exit(1)
