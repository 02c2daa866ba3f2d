"""Files written whole or not at all, by one writer at a time, and locks that end with their process."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from ella.atomic import make_folder, replacing, write_atomically, write_text_atomically
from ella.locks import Lock, one_writer

# As bytes of a Latin-1 system: no UTF-8.
ODD = os.fsdecode(b"caf\xe9")


@contextmanager
def full_disk(limit: int = 2000):
    """No file can grow beyond ``limit`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def in_child(work) -> int:
    """The process id of a fork that does ``work`` and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def ended(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


# --- whole or not at all ---------------------------------------------------------------------------------------------


def large_tensors(path):
    save_file({"x": torch.ones(4000)}, path)


def large_text(path):
    path.write_text("a" * 4000)


@pytest.mark.parametrize("write", [large_tensors, large_text])
def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path, write):
    path = tmp_path / "kept"
    path.write_text("old")
    with full_disk(), pytest.raises(OSError) as caught:
        write_atomically(path, write)
    assert caught.value.errno == errno.EFBIG and caught.value.__cause__ is not None
    assert str(caught.value) == f"cannot write {path}: File too large"
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [large_tensors, large_text])
def test_places_that_cannot_be_written(tmp_path, write):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for path, kind in (
        (tmp_path / "missing" / "x", FileNotFoundError),
        (tmp_path / "file" / "x", NotADirectoryError),
        (tmp_path / "folder", IsADirectoryError),
    ):
        with pytest.raises(kind, match=f"cannot write {path}: "):
            write_atomically(path, write)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_replaces_only_an_empty_one(tmp_path):
    for name in ("empty", "used"):
        (tmp_path / name).mkdir()
    (tmp_path / "used" / "old").touch()
    for name in ("new", "empty"):
        with replacing(tmp_path / name) as temporary:
            temporary.mkdir()
            (temporary / "x").touch()
        assert (tmp_path / name / "x").exists()
    with (
        pytest.raises(OSError, match=r"cannot write .*used: Directory not empty"),
        replacing(tmp_path / "used") as path,
    ):
        path.mkdir()
    assert (tmp_path / "used" / "old").exists() and not list(tmp_path.glob(".*"))


def test_file_and_folders_are_flushed(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def note(descriptor):
        flushed.append(os.stat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    make_folder(tmp_path / "a" / "b")
    assert flushed == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]
    path = write_text_atomically(tmp_path / "f", "text")
    assert flushed[2:] == [path.stat().st_ino, tmp_path.stat().st_ino]


def test_names_that_are_not_utf8(tmp_path):
    folder = tmp_path / ODD
    folder.mkdir()
    write_atomically(folder / f"{ODD}.safetensors", lambda path: save_file({"x": torch.arange(3.0)}, path))
    # safetensors itself reads no such name.
    plain = (folder / f"{ODD}.safetensors").rename(tmp_path / "x")
    assert load_file(plain)["x"].tolist() == [0, 1, 2]
    write_text_atomically(folder / ODD, f"ü {ODD}")
    assert (folder / ODD).read_text(encoding="utf-8") == "ü caf\\udce9"
    assert [p.name for p in folder.iterdir()] == [ODD]


# --- temporary files -------------------------------------------------------------------------------------------------


def test_the_next_writer_sweeps_what_killed_ones_left_and_nothing_else(tmp_path):
    def killed():
        def write(path):
            path.write_text("half")
            (path.parent / ".tmpLibrary").touch()  # safetensors has temporary files of its own
            os.kill(os.getpid(), signal.SIGKILL)

        write_atomically(tmp_path / "f.txt", write)

    for _ in range(3):
        assert ended(in_child(killed)) == signal.SIGKILL
        assert len(list(tmp_path.glob(".f.txt.*.tmp/.tmpLibrary"))) == 1
    (tmp_path / ".f.txt.4711.tmp.txt").touch()  # as they were named before
    others = [".f.txt.swp", ".f.txt.tmp", ".g.txt.12345678.tmp", ".hidden", ".tmpLibrary", "f.txt.12345678.tmp"]
    for name in others:
        (tmp_path / name).touch()
    write_text_atomically(tmp_path / "f.txt", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "f.txt"])


def test_a_living_writer_keeps_its_temporary_file(tmp_path):
    path, inside, results = tmp_path / "f", threading.Event(), []

    def slowly(temporary):
        temporary.write_text("slow")
        inside.set()
        time.sleep(0.2)
        results.append("slow")

    slow = threading.Thread(target=write_atomically, args=(path, slowly))
    slow.start()
    assert inside.wait(10)
    write_text_atomically(path, "quick")
    results.append("quick")
    slow.join()
    # The second waited for the first, so it has the last word.
    assert results == ["slow", "quick"] and path.read_text() == "quick"


# --- locks -----------------------------------------------------------------------------------------------------------


def is_free(folder) -> bool:
    lock = Lock(folder, os.O_RDONLY)
    try:
        return lock.acquire(wait=False)
    except BlockingIOError:
        return False
    finally:
        lock.release()


def test_a_writer_may_enter_again_and_others_may_not(tmp_path):
    with one_writer(tmp_path) as outer, one_writer(tmp_path / ".." / tmp_path.name) as inner:
        assert outer and inner and not is_free(tmp_path)
    assert is_free(tmp_path) and list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), one_writer(tmp_path):
        raise RuntimeError
    assert is_free(tmp_path)


def test_a_link_to_a_folder_is_that_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with one_writer(tmp_path / "link"):
        assert not is_free(tmp_path / "real")


def test_there_is_no_lock_on_what_is_not_there(tmp_path):
    with one_writer(tmp_path / "missing") as held:
        assert not held


def test_a_lock_ends_with_its_process_even_if_a_fork_of_it_lives(tmp_path):
    """The child of the killed process stands for a data loader's worker."""
    read, write = os.pipe()

    def hold():
        with one_writer(tmp_path):
            worker = in_child(lambda: time.sleep(60))
            os.write(write, str(worker).encode())
            time.sleep(60)

    holder = in_child(hold)
    worker = int(os.read(read, 20))
    try:
        assert not is_free(tmp_path)
        os.kill(holder, signal.SIGKILL)
        ended(holder)
        assert is_free(tmp_path)
        os.kill(worker, 0)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_fork_that_leaves_the_block_leaves_the_lock(tmp_path):
    block = one_writer(tmp_path)
    block.__enter__()
    assert ended(in_child(lambda: block.__exit__(None, None, None))) == 0
    assert not is_free(tmp_path)
    block.__exit__(None, None, None)
    assert is_free(tmp_path)


def test_without_locks_files_are_still_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("ella.locks.fcntl", None)
    (tmp_path / ".f.12345678.tmp").mkdir()
    with pytest.warns(UserWarning, match="no lock while writing, this platform has no flock"):
        write_text_atomically(tmp_path / "f", "text")
    # Nobody knows whether its writer lives.
    assert sorted(p.name for p in tmp_path.iterdir()) == [".f.12345678.tmp", "f"]
