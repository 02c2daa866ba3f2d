"""Several processes: what fails, what dies, and that none outlives its parent. The processes import this file."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path

from ella.continual import texts
from ella.continual.running import one_run
from ella.continual.workers import Failure, in_processes, prepare_process

WAIT = 60.0


def make(folder):
    def work(item):
        if item == "raise":
            raise OSError(28, "no room")
        if item == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "stay":
            with one_run(folder):
                while True:
                    (Path(folder) / "alive").touch()
                    time.sleep(0.02)
        return 2 * item

    return work


def until(condition) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def is_free(folder) -> bool:
    try:
        with one_run(folder):
            return True
    except BlockingIOError:
        return False


def test_who_fails_or_dies_takes_no_other_along(tmp_path):
    drawn = []
    outcomes = in_processes(make, (tmp_path,), (drawn.append(i) or i for i in ["stay", 1, "raise", "die", 2]), 2)
    first = next(outcomes)
    assert first == (1, 2) and drawn == ["stay", 1]
    index, raised = next(outcomes)
    assert index == 2 and isinstance(raised, Failure) and raised.code == 28
    assert raised.error == "[Errno 28] no room" and "in work" in raised.traceback
    index, died = next(outcomes)
    assert index == 3 and died.error.startswith("its process ended (killed by SIGKILL") and died.code is None
    assert next(outcomes) == (4, 4)
    until((tmp_path / "alive").exists)
    outcomes.close()
    assert is_free(tmp_path)


def test_no_process_outlives_its_parent_or_is_interrupted(tmp_path):
    from ..ella.test_files import ended, in_child

    def parent():
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, lambda *_: None)
        for _ in in_processes(make, (tmp_path,), ["stay"], 1):
            pass

    pid = in_child(parent)
    alive = tmp_path / "alive"
    try:
        until(alive.exists)
        os.killpg(pid, signal.SIGINT)
        for _ in range(2):
            alive.unlink()
            until(alive.exists)
        assert not is_free(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        ended(pid)
    until(lambda: is_free(tmp_path))


def test_no_work():
    assert list(in_processes(make, (), [], 2)) == []


def test_a_process_says_what_is_lost_once_and_in_a_line(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        prepare_process()
        for _ in range(3):
            warnings.warn_explicit("1 of 2 were cut", UserWarning, texts.__file__, 1)
            warnings.warn_explicit("not ours", UserWarning, "other.py", 1)
    said = capsys.readouterr().err
    assert said.count("1 of 2 were cut\n") == 1 and said.startswith("1 of 2 were cut\n")
    assert "1 of 2 were cut" not in said[1:]
