"""A stream's state on disk: old or new after a failure at any step, never half; another run is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ella.atomic import write_text_atomically
from ella.continual import state as module
from ella.continual.state import StreamState

from ..ella.test_files import ODD, ended, full_disk, in_child

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


class Method:
    """What is saved of a method: a model with its adapter, a past, tensors of its own."""

    adapter = "default"

    def __init__(self, value: float, past: str | None = None, own: float | None = None) -> None:
        self.model = Adapter(value)
        self.regularizer = None if past is None else Regularizer(past)
        self.own = own

    def tensors(self) -> dict[str, torch.Tensor]:
        return {} if self.own is None else {"own": torch.full((2, 2), self.own)}


def save(folder, index: int, state: StreamState | None = None) -> StreamState:
    if state is None:
        state = StreamState(folder, RUN)
        state.load()
    state.save(index, "abc"[index], {"n": index}, Method(index + 0.5, f"past {index}"))
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
    whole = json.loads(text)
    broken = [text[:40], "[]", "{}", "null", "[" * 100_000, '{"version": 1}', "\xff"]
    broken += [json.dumps({k: v for k, v in whole.items() if k != key}) for key in ("run", "state", "result")]
    broken += [json.dumps(whole | {"state": name}) for name in ("../x", "/tmp", "", "after-1-a/past", 3, None)]
    broken += [json.dumps(whole | {key: []}) for key in ("run", "result")]
    for damaged in broken:
        progress.write_bytes(damaged.encode("latin-1"))
        with pytest.raises(ValueError, match=r"progress\.json is not the progress of a run; delete"):
            seen(tmp_path)
    progress.write_text(text)
    adapter = tmp_path / "after-1-a" / "adapter.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"adapter\.safetensors is not a whole safetensors file"):
        seen(tmp_path)
    adapter.unlink()
    with pytest.raises(ValueError, match=r"points at after-1-a, which is incomplete, without adapter.safetensors;"):
        seen(tmp_path)
    shutil.rmtree(tmp_path / "after-1-a")
    with pytest.raises(ValueError, match=r"incomplete, without adapter.safetensors and past;"):
        seen(tmp_path)
    progress.unlink()
    progress.mkdir()
    with pytest.raises(IsADirectoryError, match="progress"):
        seen(tmp_path)


def test_a_lost_past_is_an_error(tmp_path):
    save(tmp_path, 0)
    shutil.move(tmp_path / "after-1-a" / "past" / "past", tmp_path / "kept")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"points at after-1-a, which is incomplete, without past; restore that"):
            seen(tmp_path)
        shutil.rmtree(tmp_path / "after-1-a" / "past", ignore_errors=True)
    (tmp_path / "after-1-a" / "past").mkdir()
    shutil.move(tmp_path / "kept", tmp_path / "after-1-a" / "past" / "past")
    assert seen(tmp_path) == OLD


def test_progress_without_the_later_notes_is_still_read(tmp_path):
    save(tmp_path, 0)
    progress = json.loads((tmp_path / "progress.json").read_text())
    del progress["past"]
    (tmp_path / "progress.json").write_text(json.dumps(progress))
    save_file({"lora_A.default.weight": torch.full((2, 3), 0.5)}, tmp_path / "after-1-a" / "adapter.safetensors")
    assert seen(tmp_path) == OLD
    save(tmp_path, 1)
    assert seen(tmp_path) == NEW


def test_a_flipped_bit_in_the_adapter_is_noticed(tmp_path):
    save(tmp_path, 0)
    path = tmp_path / "after-1-a" / "adapter.safetensors"
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            assert seen(tmp_path) == OLD, place
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0.8 * len(whole)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t[:1, :1].clone(), r"expected torch.float32 \(2, 3\), found torch.float32 \(1, 1\)"),
        (lambda t: t.double(), r"expected torch.float32 \(2, 3\), found torch.float64 \(2, 3\)"),
        (lambda t: t / 0, "expected finite values"),
        (lambda t: t + 1, "its sha256 is not the one it was saved with"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path, change, message):
    state = save(tmp_path, 0)
    path = tmp_path / "after-1-a" / "adapter.safetensors"
    tensors = load_file(path)
    metadata = {"sha256": module.digest(tensors)} if "sha256" in message else None
    save_file({name: change(tensor) for name, tensor in tensors.items()}, path, metadata=metadata)
    model = Adapter(-1.0)
    with pytest.raises(ValueError, match=message) as caught:
        state.load_adapter(model, "default")
    assert str(path) in str(caught.value) and (model.lora_A["default"].weight == -1).all()


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    others = ["after-party.txt", ".editor.tmp", "notes.md", "after-1-report.pdf", "after-2-b", ".progress.json.swp"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").touch()
    for link in ("after-1-link", "after-3-c"):
        (tmp_path / link).symlink_to("elsewhere")
    (tmp_path / "after-1-my notes").mkdir()
    state = save(tmp_path, 0)
    save(tmp_path, 1, state)
    # The name is taken by a file that is not ours.
    assert seen(tmp_path) == NEW and (tmp_path / "after-2-b.2").is_dir() and (tmp_path / "after-2-b").is_file()
    state.clear()
    others += ["elsewhere", "after-1-link", "after-3-c", "after-1-my notes"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(others)
    assert (tmp_path / "elsewhere" / "x").exists()
    assert state.load() is None and state.past_dir is None


def test_a_full_disk_leaves_the_old_state(tmp_path):
    state = save(tmp_path, 0)
    before = sorted(tmp_path.iterdir())
    for limit, name in ((60, "after-2-b"), (300, "progress.json")):
        with full_disk(limit), pytest.raises(OSError, match=f"cannot write {tmp_path / name}: File too large"):
            state.save(1, "b", {"n": [1] * 300}, Method(1.5, "past 1"))
        assert seen(tmp_path) == OLD
    save(tmp_path, 1, state)
    assert seen(tmp_path) == NEW and len(list(tmp_path.iterdir())) == len(before)


def test_folders_by_odd_names_and_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for folder in (tmp_path / ODD, tmp_path / "link"):
        save(folder, 0)
        save(folder, 1)
        assert seen(folder) == NEW


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match="file"):
            save(folder, 0)


def test_names_of_tasks_become_folder_names(tmp_path):
    state = StreamState(tmp_path, RUN)
    state.save(0, "../a b/ü", {"n": 0}, Method(0.5))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["after-1-.._a_b_", "progress.json"]
    assert state.past_dir is None and StreamState(tmp_path, RUN).load()["result"] == {"n": 0}
    state.save(1, "long " * 100, {"n": 1}, Method(0.5))
    assert StreamState(tmp_path, RUN).load()["result"] == {"n": 1}


def test_nothing_is_pickled(tmp_path):
    save(tmp_path, 0)
    files = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {"adapter.safetensors", "past", "progress.json"}


# --- several processes -----------------------------------------------------------------------------------------------


def test_two_savers_in_one_folder_lose_nothing(tmp_path):
    def work():
        state = StreamState(tmp_path, RUN)
        for i in range(12):
            save(tmp_path, i % 3, state)
        os.kill(os.getpid(), signal.SIGUSR1)  # says that all went through

    pids = [in_child(work) for _ in range(2)]
    assert [ended(pid) for pid in pids] == [signal.SIGUSR1] * 2
    assert seen(tmp_path) == (2, 2.5, "past 2")
    save(tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 2


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.continual.test_state import save, seen

folder, draw = Path(sys.argv[1]), random.Random(0)
took = []
for index in (1, 2, 0):
    start = time.perf_counter()
    save(folder, index)
    took.append(time.perf_counter() - start)
found, kills = set(), 0
# On a busy machine a child may be killed before it has saved: then it takes more of them to see every state.
while kills < int(sys.argv[2]) or (found != {0, 1, 2} and kills < 1000):
    kills += 1
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                for index in range(3):
                    save(folder, index)
        finally:
            os._exit(1)
    time.sleep(draw.uniform(0.002, 0.002 + 5 * min(took)))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    n, value, past = seen(folder)
    assert (value, past) == (n + 0.5, f"past {n}")
    found.add(n)
    assert len(os.listdir(folder)) <= 4, "what an earlier kill left was not swept"
save(folder, 1)
assert len(os.listdir(folder)) == 2 and seen(folder)[0] == 1 and found == {0, 1, 2}
"""


@pytest.mark.slow
def test_100_kills_leave_whole_states(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "100"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_tensors_of_the_method_are_saved_with_it(tmp_path):
    state = StreamState(tmp_path, RUN)
    state.save(0, "a", {"n": 0}, Method(0.5, own=3.0))
    found = StreamState(tmp_path, RUN)
    found.load()
    assert found.tensors()["own"].tolist() == [[3.0, 3.0], [3.0, 3.0]]
    (path,) = tmp_path.glob("after-*/method.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="its sha256 is not the one"):
        found.tensors()
    path.unlink()
    with pytest.raises(ValueError, match=r"incomplete, without method.safetensors"):
        StreamState(tmp_path, RUN).load()
    state.save(1, "b", {"n": 1}, Method(0.5))
    found.load()
    assert found.tensors() == {}
