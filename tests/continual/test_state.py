"""A stream's state on disk: old or new after a failure at any step, never half; another run is refused."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from torch import nn

from ella.atomic import write_text_atomically
from ella.continual import state as module
from ella.continual.state import StreamState

RUN = {"config": {"seed": 0, "ella": {"ella_lambda": 1.0}}, "tasks": {"a": "f1", "b": "f2"}, "order": ("a", "b")}


class Killed(BaseException):
    """Stands for the process ending here: nothing in the package may catch it."""


class Adapter(nn.Module):
    """Parameters named as PEFT names them."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(3, 2, bias=False)})
        self.base = nn.Linear(3, 3)
        nn.init.constant_(self.lora_A["default"].weight, value)


class Regularizer:
    def __init__(self, text: str) -> None:
        self.text = text

    def save_pretrained(self, folder: str) -> None:
        os.makedirs(folder)
        with open(os.path.join(folder, "past"), "w") as file:
            file.write(self.text)


def save(folder, index: int, state: StreamState | None = None) -> StreamState:
    if state is None:
        state = StreamState(folder, RUN)
        state.load()
    state.save(index, "abc"[index], {"n": index}, Adapter(index + 0.5), "default", Regularizer(f"past {index}"))
    return state


def seen(folder) -> tuple | None:
    """(result, adapter value, past) as a new process would find them."""
    state = StreamState(folder, RUN)
    saved = state.load()
    if saved is None:
        return None
    model = Adapter(-1.0)
    state.load_adapter(model, "default")
    (value,) = model.lora_A["default"].weight.unique().tolist()
    return saved["result"]["n"], value, (state.past_dir / "past").read_text()


OLD, NEW = (0, 0.5, "past 0"), (1, 1.5, "past 1")


def test_round_trip(tmp_path):
    folder = tmp_path / "run"
    assert seen(folder) is None and not folder.exists()
    save(folder, 0)
    assert seen(folder) == OLD
    save(folder, 1)
    assert seen(folder) == NEW
    assert sorted(p.name for p in folder.iterdir()) == ["after-2-b", "progress.json"]


def test_only_the_adapter_is_copied(tmp_path):
    state = save(tmp_path, 0)
    model = Adapter(-1.0)
    base = model.base.weight.clone()
    state.load_adapter(model, "default")
    assert torch.equal(model.base.weight, base)
    with pytest.raises(ValueError, match=r"saved adapter has other parameters: \['lora_A.default.weight'\]"):
        state.load_adapter(Adapter(0.0), "other")


# Everything that touches the disk, in the order of a save: a failure before and after each of them.
STEPS = [
    (shutil, "rmtree"),
    (module, "save_file"),
    (Regularizer, "save_pretrained"),
    (os, "replace"),
    (os, "fsync"),
    (module.Path, "mkdir"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("owner, name", STEPS, ids=[name for _, name in STEPS])
def test_a_kill_at_any_step_leaves_old_or_new(tmp_path, monkeypatch, owner, name, when):
    """Each call of each step is interrupted in turn, until a save gets through without meeting its interruption."""
    results, interrupted = [], 0
    for nth in range(10):
        folder = tmp_path / f"run-{nth}"
        state = save(folder, 0)
        # What an earlier kill may have left is swept by the next save, so that deletions are interrupted too.
        for left in ("after-2-b", ".after-2-b.123.tmp"):
            (folder / left).mkdir()
            (folder / left / "half").touch()
        (folder / ".progress.json.123.tmp").touch()
        calls = 0
        original = getattr(owner, name)

        def failing(*args, _nth=nth, _original=original, **kwargs):
            nonlocal calls
            calls += 1
            if calls - 1 == _nth and when == "before":
                raise Killed
            result = _original(*args, **kwargs)
            if calls - 1 == _nth:
                raise Killed
            return result

        monkeypatch.setattr(owner, name, failing)
        try:
            save(folder, 1, state)
            done = True
        except Killed:
            done = False
        monkeypatch.undo()
        results.append(seen(folder))
        assert results[-1] in (OLD, NEW)
        # Whatever was left does not stand in the way of going on after the last finished task.
        index = results[-1][0] + 1
        save(folder, index)
        assert seen(folder) == (index, index + 0.5, f"past {index}")
        assert sorted(p.name for p in folder.iterdir()) == [f"after-{index + 1}-{'abc'[index]}", "progress.json"]
        if done:
            break
        interrupted += 1
    assert done and interrupted >= 1 and results[-1] == NEW
    assert results[0] == OLD or name == "rmtree"


def test_text_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_text_atomically(path, "old ü")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        write_text_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old ü"


def test_another_run_is_refused_with_what_differs(tmp_path):
    save(tmp_path, 0)
    other = json.loads(json.dumps(RUN))
    other["config"]["ella"]["ella_lambda"] = 2.0
    other["tasks"]["c"] = "f3"
    del other["tasks"]["b"]
    with pytest.raises(ValueError) as caught:
        StreamState(tmp_path, other).load()
    message = str(caught.value)
    assert "holds another run" in message and "new output folder" in message
    assert "config.ella.ella_lambda was 1.0, now 2.0" in message
    assert "tasks.b was 'f2', now None" in message and "tasks.c was None, now 'f3'" in message
    assert "seed" not in message
    assert seen(tmp_path) == OLD


def test_damaged_states_are_named(tmp_path):
    save(tmp_path, 0)
    progress = tmp_path / "progress.json"
    text = progress.read_text()
    progress.write_text(text.replace('"version": 1', '"version": 99'))
    with pytest.raises(ValueError, match="has format version 99; this code reads 1"):
        seen(tmp_path)
    for broken in (text[:40], "[]", "{}"):
        progress.write_text(broken)
        with pytest.raises(ValueError, match=r"progress\.json is not the progress of a run; delete"):
            seen(tmp_path)
    progress.write_text(text)
    adapter = tmp_path / "after-1-a" / "adapter.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"adapter\.safetensors is not a whole safetensors file"):
        seen(tmp_path)
    adapter.unlink()
    with pytest.raises(ValueError, match="points at after-1-a, which is incomplete"):
        seen(tmp_path)


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    for name in ("after-party.txt", ".editor.tmp", "notes.md"):
        (tmp_path / name).touch()
    state = save(tmp_path, 0)
    save(tmp_path, 1, state)
    state.clear()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".editor.tmp", "after-party.txt", "notes.md"]
    assert state.load() is None and state.past_dir is None


def test_names_of_tasks_become_folder_names(tmp_path):
    state = StreamState(tmp_path, RUN)
    state.save(0, "../a b/ü", {"n": 0}, Adapter(0.5), "default", None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["after-1-.._a_b_", "progress.json"]
    assert state.past_dir is None and StreamState(tmp_path, RUN).load()["result"] == {"n": 0}


def test_nothing_is_pickled(tmp_path):
    save(tmp_path, 0)
    files = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {"adapter.safetensors", "past", "progress.json"}
