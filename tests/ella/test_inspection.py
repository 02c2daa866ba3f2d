"""Where ``ella inspect`` finds saved pasts, and what it refuses."""

from __future__ import annotations

import shutil

import pytest

from ella import inspection
from ella.checkpoint import PAST_FILE, save_past
from ella.inspection import describe_state

from .test_checkpoint import state
from .test_files import ODD


def test_states_behind_links_are_found_once(tmp_path):
    save_past(tmp_path / "elsewhere" / "after-1-a" / "past", state(tasks=["linked"]))
    save_past(tmp_path / "out" / ODD / "past", state(tasks=["odd"]))
    save_past(tmp_path / "out" / ".after-2-b.12345678.tmp" / "past", state(tasks=["half"]))
    (tmp_path / "out" / "runs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "out")
    text = describe_state(tmp_path / "out")
    assert text.count("tasks: linked") == text.count("tasks: odd") == 1 and "half" not in text
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "after-1-a" / "past")
    assert "tasks: linked" in describe_state(tmp_path / "link")


def test_a_run_that_goes_on_meanwhile(tmp_path, monkeypatch):
    """Its state is replaced, after it was found and before it is read."""
    save_past(tmp_path / "after-1-a" / "past", state(tasks=["first"]))
    load_past = inspection.load_past

    def replaced_first(path):
        if (tmp_path / "after-1-a").exists():
            save_past(tmp_path / "after-2-b" / "past", state(tasks=["first", "second"]))
            shutil.rmtree(tmp_path / "after-1-a")
        return load_past(path)

    monkeypatch.setattr(inspection, "load_past", replaced_first)
    assert "tasks: first, second" in describe_state(tmp_path)


def test_what_is_no_state_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=f"no folder at {folder}"):
            describe_state(folder)
    (tmp_path / PAST_FILE).mkdir()
    with pytest.raises(IsADirectoryError, match=f"{PAST_FILE} is no file"):
        describe_state(tmp_path)
    (tmp_path / PAST_FILE).rmdir()
    path = save_past(tmp_path / "a", state())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path} is not a whole safetensors file"):
        describe_state(tmp_path)
