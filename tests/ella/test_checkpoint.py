"""The saved past: exactly what was saved, or an error that names the file and the layer."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from ella.checkpoint import PAST_FILE, PastState, StoredLayer, load_past, save_past
from ella_kernels import LowRank

from .test_files import ODD, ended, full_disk, in_child

ROOT = Path(__file__).resolve().parents[2]


def state(value: float = 1.0, tasks=("one", "two"), rank: int = 3) -> PastState:
    """Layer "a" of two parts with energies, "b" with a bias; values of their own everywhere."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return value * torch.rand(shape, generator=generator)

    a = [LowRank(draw(5, rank), draw(rank, 4), draw(5), draw(4)) for _ in range(2)]
    b = [LowRank(draw(6, rank), draw(rank, 4))]
    layers = {"a": StoredLayer(a, None, [0.0, 0.25]), "b": StoredLayer(b, draw(6), [0.0, 0.0])}
    shapes = {"a": (2, 5, 4), "b": (1, 6, 4)}
    return PastState({"past_rank": rank}, list(tasks), layers, shapes, {"base_before": {"a": 7}})


def same(one: PastState, other: PastState) -> bool:
    def plain(found):
        return {
            name: (layer.relative_error, {key: (t.dtype, t.tolist()) for key, t in layer.tensors().items()})
            for name, layer in found.layers.items()
        }

    rest = ("config", "tasks", "shapes", "extra")
    return plain(one) == plain(other) and all(getattr(one, key) == getattr(other, key) for key in rest)


def parts(folder) -> tuple[dict, dict]:
    """Tensors and description of a saved past."""
    with safe_open(folder / PAST_FILE, "pt") as file:
        return load_file(folder / PAST_FILE), json.loads(file.metadata()["ella"])


def write_format_1(folder, tensors, description) -> None:
    """As it was written before there were digests."""
    description = {key: value for key, value in description.items() if key != "sha256"} | {"format": 1}
    save_file(tensors, folder / PAST_FILE, metadata={"ella": json.dumps(description)})


# --- what was saved --------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    assert save_past(tmp_path / "new" / "folder", state()) == tmp_path / "new" / "folder" / PAST_FILE
    assert same(load_past(tmp_path / "new" / "folder"), state())
    assert not same(load_past(tmp_path / "new" / "folder"), state(2.0))
    empty = PastState({}, [], {}, {"a": (1, 2, 3)})
    save_past(tmp_path, empty)
    assert same(load_past(tmp_path), empty)


def test_format_1_is_still_read(tmp_path):
    save_past(tmp_path, state())
    tensors, description = parts(tmp_path)
    write_format_1(tmp_path, tensors, description)
    assert same(load_past(tmp_path), state())
    del description["extra"]
    write_format_1(tmp_path, tensors, description)
    assert load_past(tmp_path).extra == {}


def test_the_header_holds_the_digests(tmp_path):
    """So that a file can be checked without this package, and stays readable when the code changes."""
    save_past(tmp_path, state())
    tensors, description = parts(tmp_path)
    with safe_open(tmp_path / PAST_FILE, "pt") as file:
        metadata = file.metadata()
    assert description["format"] == 2 and description["sha256"].keys() == {"a", "b"}
    assert metadata["sha256"] == hashlib.sha256(metadata["ella"].encode()).hexdigest()
    expected = hashlib.sha256()
    for key in ("bias", "left", "right"):
        tensor = tensors[f"b.{key}"]
        expected.update(json.dumps([key, "torch.float32", list(tensor.shape)]).encode() + tensor.numpy().tobytes())
    assert description["sha256"]["b"] == expected.hexdigest()


def test_half_precision_is_stored_as_float32(tmp_path):
    half = state()
    for layer in half.layers.values():
        layer.parts = [LowRank(*(None if t is None else t.bfloat16() for t in part)) for part in layer.parts]
    save_past(tmp_path, half)
    for layer, loaded in zip(half.layers.values(), load_past(tmp_path).layers.values(), strict=True):
        for part, back in zip(layer.parts, loaded.parts, strict=True):
            assert back.left.dtype == torch.float32 and torch.equal(back.left, part.left.float())


def test_loaded_tensors_are_copies(tmp_path):
    path = save_past(tmp_path, state())
    loaded = load_past(tmp_path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert same(loaded, state())
    path.write_bytes(b"")
    for layer in loaded.layers.values():
        for tensor in layer.tensors().values():
            tensor.add_(1)
        layer.parts[0].left.zero_()
    assert loaded.layers["a"].parts[0].left.sum() == 0


def test_a_save_while_the_file_is_read_gives_one_of_the_two(tmp_path, monkeypatch):
    save_past(tmp_path, state())
    read_bytes, reads = Path.read_bytes, []

    def replaced_meanwhile(path):
        data = read_bytes(path)
        reads.append(path)
        save_past(tmp_path, state(2.0, ["new"], rank=2))
        return data

    monkeypatch.setattr(Path, "read_bytes", replaced_meanwhile)
    assert same(load_past(tmp_path), state()) and reads == [tmp_path / PAST_FILE]
    assert same(load_past(tmp_path), state(2.0, ["new"], rank=2))


# --- what was changed ------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    path = save_past(tmp_path, state(rank=1))
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            assert same(load_past(tmp_path), state(rank=1)), place
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0.99 * len(whole)


def test_a_flipped_bit_names_its_layer(tmp_path):
    path = save_past(tmp_path, state())
    whole = path.read_bytes()
    (value,) = state().layers["b"].bias[:1]
    place = whole.index(value.numpy().tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"layer 'b': the sha256 of its tensors is \w+; expected"):
        load_past(tmp_path)


def test_another_description_with_the_old_digest_is_refused(tmp_path):
    save_past(tmp_path, state())
    with safe_open(tmp_path / PAST_FILE, "pt") as file:
        metadata = file.metadata()
    tensors, description = parts(tmp_path)
    for changed in (description | {"tasks": ["other"]}, description | {"format": 1}):
        save_file(tensors, tmp_path / PAST_FILE, metadata=metadata | {"ella": json.dumps(changed)})
        with pytest.raises(ValueError, match="the sha256 of its description is"):
            load_past(tmp_path)
    save_file(tensors, tmp_path / PAST_FILE, metadata={"ella": metadata["ella"]})
    with pytest.raises(ValueError, match="the sha256 of its description is"):
        load_past(tmp_path)


NAN, INF = float("nan"), float("inf")


def first(value):
    """A change of a tensor's first element."""
    return lambda t: torch.cat([torch.tensor([value], dtype=t.dtype), t.flatten()[1:]]).reshape(t.shape)


TENSORS = {
    "NaN": ("a.left", first(NAN), "layer 'a', left: expected finite values, found 1 that are not"),
    "infinite": ("b.right", first(-INF), "layer 'b', right: expected finite values"),
    "infinite bias": ("b.bias", first(INF), "layer 'b', bias: expected finite values"),
    "NaN energy": ("a.col_energy", first(NAN), "layer 'a', col_energy: expected finite values"),
    "negative energy": ("a.row_energy", first(-1e-6), "layer 'a', row_energy: expected energies of at least 0"),
    "int": ("a.left", torch.Tensor.long, "layer 'a', left: expected float32 or float64, found torch.int64"),
    "bool": ("b.right", torch.Tensor.bool, "layer 'b', right: expected float32 or float64, found torch.bool"),
    "complex": ("a.left", torch.Tensor.cfloat, "found torch.complex64"),
    "half": ("a.row_energy", torch.Tensor.half, "found torch.float16"),
    "fp8": ("b.bias", lambda t: t.to(torch.float8_e4m3fn), "found torch.float8_e4m3fn"),
    "unknown dtype": ("b.bias", None, "is not a whole safetensors file: 'F8_E8M0'"),
    "transposed": ("b.left", lambda t: t.mT.contiguous(), r"layer 'b', left: expected shape \(1, 6, 6\)"),
    "flat": ("b.left", torch.Tensor.flatten, "layer 'b', left: expected shape"),
    "scalar": ("b.left", torch.Tensor.sum, "layer 'b', left: expected shape"),
    "other rank": ("a.right", lambda t: t[:, :2].clone(), r"layer 'a', right: expected shape \(2, 3, 4\)"),
    "one part less": ("a.row_energy", lambda t: t[:1].clone(), r"row_energy: expected shape \(2, 5\), found \(1, 5\)"),
    "short bias": ("b.bias", lambda t: t[:1].clone(), r"layer 'b', bias: expected shape \(6,\), found \(1,\)"),
    "long bias": ("b.bias", lambda t: torch.cat([t, t]), "layer 'b', bias: expected shape"),
}


@pytest.mark.parametrize("key, change, message", TENSORS.values(), ids=TENSORS)
def test_odd_tensors_are_named(tmp_path, key, change, message):
    save_past(tmp_path, state())
    tensors, description = parts(tmp_path)
    if change is None:
        data = save(tensors | {key: tensors[key].to(torch.float8_e4m3fn)}).replace(b"F8_E4M3", b"F8_E8M0")
        (tmp_path / PAST_FILE).write_bytes(data)
    else:
        write_format_1(tmp_path, tensors | {key: change(tensors[key])}, description)
    with pytest.raises(ValueError, match=message) as caught:
        load_past(tmp_path)
    assert str(tmp_path / PAST_FILE) in str(caught.value)


@pytest.mark.parametrize(
    "key, message",
    [
        ("a.left", "lists layer 'a' but holds no factors for it"),
        ("b.right", "lists layer 'b' but holds no factors for it"),
        ("a.row_energy", "layer 'a': expected row and column energies or neither"),
        ("a.col_energy", "layer 'a': expected row and column energies or neither"),
    ],
)
def test_missing_tensors_are_named(tmp_path, key, message):
    save_past(tmp_path, state())
    tensors, description = parts(tmp_path)
    del tensors[key]
    write_format_1(tmp_path, tensors, description)
    with pytest.raises(ValueError, match=message):
        load_past(tmp_path)


@pytest.mark.parametrize("key", ["a.lfet", "c.left", "left", "a.b.left"])
def test_tensors_of_no_layer_are_named(tmp_path, key):
    save_past(tmp_path, state())
    tensors, description = parts(tmp_path)
    write_format_1(tmp_path, tensors | {key: tensors["a.left"].clone()}, description)
    with pytest.raises(ValueError, match=rf"holds tensors that belong to no layer: \['{key}'\]"):
        load_past(tmp_path)


GONE = object()
DESCRIPTIONS = [
    *((key, GONE, f"as '{key}' of its description, found nothing") for key in ("config", "tasks", "shapes")),
    ("relative_error", GONE, "expected a dict as 'relative_error' of its description, found nothing"),
    ("config", [], "expected a dict as 'config' of its description, found list"),
    ("tasks", "abc", "expected a list as 'tasks' of its description, found str"),
    ("tasks", ["one", 2], "expected texts as 'tasks' of its description, found 2"),
    ("extra", None, "expected a dict as 'extra' of its description, found NoneType"),
    ("shapes", {"a": [2, 5, 4]}, r"for some of its layers only; expected all or none, differing: \['b'\]"),
    ("shapes", {"a": [2, 5], "b": [1, 6, 4]}, r"layer 'a': expected a shape \[parts, out, in\], found \[2, 5\]"),
    ("shapes", {"a": [2, 5, 4], "b": [1, 6, -4]}, "layer 'b': expected a shape"),
    ("shapes", {"a": [2, 5, 4], "b": "abc"}, "layer 'b': expected a shape"),
    ("shapes", {"a": [2, 5, 4.0], "b": [1, 6, 4]}, "layer 'a': expected a shape"),
    ("shapes", {"a": [2, 5, 3], "b": [1, 6, 4]}, "layer 'a', right: expected shape"),
    ("relative_error", {"a": [0.0]}, r"expected all or none, differing: \['b'\]"),
    ("relative_error", {}, r"holds tensors that belong to no layer: \['a.col_energy'"),
    ("relative_error", {"a": 0.0, "b": []}, "layer 'a': expected relative errors of at least 0, found 0.0"),
    ("relative_error", {"a": [], "b": [NAN]}, r"layer 'b': expected relative errors of at least 0, found \[nan\]"),
    ("relative_error", {"a": [], "b": [-0.5]}, "layer 'b': expected relative errors of at least 0"),
    ("relative_error", {"a": ["x"], "b": []}, "layer 'a': expected relative errors of at least 0"),
    ("surprise", 1, r"its description has unknown keys \['surprise'\]"),
]


@pytest.mark.parametrize("key, value, message", DESCRIPTIONS)
def test_odd_descriptions_are_named(tmp_path, key, value, message):
    save_past(tmp_path, state())
    tensors, description = parts(tmp_path)
    description = {k: v for k, v in description.items() if k != key} | ({} if value is GONE else {key: value})
    write_format_1(tmp_path, tensors, description)
    with pytest.raises(ValueError, match=message) as caught:
        load_past(tmp_path)
    assert str(tmp_path / PAST_FILE) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"format": []}', "[" * 100_000])
def test_files_of_others_are_refused(tmp_path, text):
    for metadata in (None, {"format": "pt"}, {"ella": text}):
        save_file({"x": torch.ones(2)}, tmp_path / PAST_FILE, metadata=metadata)
        with pytest.raises(ValueError, match=r"was not written by this package|has format \[\]; this version reads"):
            load_past(tmp_path)


@pytest.mark.parametrize("found", [0, 3, -1, True, 1.0, "2", None])
def test_other_formats_are_refused(tmp_path, found):
    save_file({}, tmp_path / PAST_FILE, metadata={"ella": json.dumps({"format": found})})
    with pytest.raises(ValueError, match=rf"has format {found!r}; this version reads 1 to 2"):
        load_past(tmp_path)


# --- what cannot be loaded is not saved ------------------------------------------------------------------------------


def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path):
    save_past(tmp_path, state())
    for change, message in (
        (lambda s: s.layers["a"].parts[1].left.fill_(NAN), "layer 'a', left: expected finite values"),
        (lambda s: s.layers["a"].parts[0].row_energy.neg_(), "layer 'a', row_energy: expected energies"),
        (lambda s: s.shapes.update(b=(1, 6, 5)), "layer 'b', right: expected shape"),
        (lambda s: s.tasks.append(None), "expected texts as 'tasks'"),
        (lambda s: s.layers.pop("b"), "for some of its layers only"),
    ):
        wrong = state(2.0)
        change(wrong)
        with pytest.raises(ValueError, match=message):
            save_past(tmp_path, wrong)
        assert same(load_past(tmp_path), state()) and len(list(tmp_path.iterdir())) == 1


# --- the file system -------------------------------------------------------------------------------------------------


def test_places_without_a_state(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(FileNotFoundError, match=f"no saved past at {folder / PAST_FILE}"):
            load_past(folder)
    (tmp_path / PAST_FILE).mkdir()
    with pytest.raises(IsADirectoryError, match="is no file; expected a safetensors file there"):
        load_past(tmp_path)
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        save_past(tmp_path, state())
    with pytest.raises(OSError, match="file"):
        save_past(tmp_path / "file", state())
    (tmp_path / PAST_FILE).rmdir()
    os.mkfifo(tmp_path / PAST_FILE)
    with pytest.raises(OSError, match="is no file"):
        load_past(tmp_path)


def test_a_full_disk_leaves_the_old_state(tmp_path):
    save_past(tmp_path, state())
    with full_disk(1000), pytest.raises(OSError, match=f"cannot write {tmp_path / PAST_FILE}: File too large"):
        save_past(tmp_path, state(2.0, rank=50))
    assert same(load_past(tmp_path), state()) and len(list(tmp_path.iterdir())) == 1


def test_folders_by_odd_names_and_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for folder in (tmp_path / ODD, tmp_path / "link"):
        save_past(str(folder), state())
        assert same(load_past(str(folder)), state())
    assert (tmp_path / "real" / PAST_FILE).is_file() and (tmp_path / "link").is_symlink()
    with pytest.raises(FileNotFoundError):
        load_past(tmp_path / "real" / ODD)


# --- several savers --------------------------------------------------------------------------------------------------


def test_savers_take_turns(tmp_path):
    """Two threads and two processes; loads meanwhile find one of the states, whole."""
    states = {value: state(value, [str(value)], rank) for value, rank in ((1.0, 3), (2.0, 3), (3.0, 30), (4.0, 1))}
    save_past(tmp_path, states[1.0])
    errors = []

    def work(value):
        try:
            for _ in range(40):
                save_past(tmp_path, states[value])
        except BaseException as error:
            errors.append(error)
            raise

    pids = [in_child(lambda value=value: (work(value), os.kill(os.getpid(), signal.SIGUSR1))) for value in (1.0, 2.0)]
    threads = [threading.Thread(target=work, args=(value,)) for value in (3.0, 4.0)]
    for thread in threads:
        thread.start()
    found = set()
    while any(thread.is_alive() for thread in threads):
        loaded = load_past(tmp_path)
        assert same(loaded, states[float(loaded.tasks[0])])
        found.update(loaded.tasks)
    # The signal says that all saves went through.
    assert [ended(pid) for pid in pids] == [signal.SIGUSR1] * 2 and errors == [] and len(found) > 1
    assert [path.name for path in tmp_path.iterdir()] == [PAST_FILE]


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from ella.checkpoint import PAST_FILE, load_past, save_past
from tests.ella.test_checkpoint import same, state

folder, kills, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(0)
states = [state(1.0, ["old"], rank=2), state(2.0, ["new"], rank=4000)]
took = []
for saved in (*states, *states, *states[::-1]):
    start = time.perf_counter()
    save_past(folder, saved)
    took.append(time.perf_counter() - start)
interrupted, found = 0, {"old": 0, "new": 0}
for i in range(kills):
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                for saved in states[:: 1 if i % 2 else -1]:
                    save_past(folder, saved)
        finally:
            os._exit(1)
    time.sleep(draw.uniform(0.002, 0.002 + 5 * min(took)))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    loaded = load_past(folder)
    assert same(loaded, states[loaded.tasks == ["new"]])
    found[loaded.tasks[0]] += 1
    interrupted += len(os.listdir(folder)) > 1
    assert len(os.listdir(folder)) <= 2, "what an earlier kill left was not swept"
save_past(folder, states[0])
assert os.listdir(folder) == [PAST_FILE] and same(load_past(folder), states[0])
print(interrupted, found["old"], found["new"])
"""


@pytest.mark.slow
def test_200_kills_leave_whole_states_and_no_temporary_files(tmp_path):
    # A process of its own: it forks, and torch's threads do not.
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "220"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    interrupted, old, new = map(int, done.stdout.split())
    # The kills fell in the middle of saves, and after both states.
    assert interrupted >= 20 and min(old, new) >= 10
