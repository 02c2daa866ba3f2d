"""What integrations of transformers are told of a run."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest

from ella.config import EllaConfig
from ella.continual import compare, tracking
from ella.continual.models import LoraSettings, build_classifier
from ella.continual.spec import parse_spec
from ella.continual.stream import StreamConfig, run_stream
from ella.continual.tracking import Tracker, make_stores

from . import tiny

CONFIG = StreamConfig(batch_size=2, learning_rate=1e-2, ella=EllaConfig(1e2, normalize="rms"))
STEPS = 12


@pytest.fixture
def run(bert, tmp_path):
    """One run of two tasks of twelve steps in ``tmp_path``."""

    def run(tracker, **options):
        with tracker:
            tasks = tiny.two_tasks(n_train=2 * STEPS, n_test=8)
            classifier = build_classifier(bert, lora=LoraSettings(r=4, alpha=8))
            return run_stream(classifier, tasks, CONFIG, tmp_path, progress=False, tracker=tracker, **options)

    return run


def written(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.glob("events.*")
    events = EventAccumulator(str(file))
    events.Reload()
    return events


def test_tensorboard_holds_losses_scores_and_settings(run, tmp_path):
    result = run(Tracker(["tensorboard"], tmp_path, "first"))
    (folder,) = tmp_path.glob("runs/*")
    events = written(folder)

    def scalars(name):
        return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)]

    (a, _), (b, c) = result.matrix.rows
    assert scalars("eval/things") == [(12, a), (24, b)] and scalars("eval/beings") == [(24, c)]
    assert scalars("eval/seen") == [(12, a), (24, (b + c) / 2)]
    assert [event.step for event in events.Scalars("train/loss")] == [0, 10, 12, 22]
    penalties = [event.value for event in events.Scalars("train/penalty")]
    # B of a fresh adapter is zero.
    assert penalties[:3] == [0, 0, 0] and penalties[3] > 0

    (text,) = events.Tensors("args/text_summary")
    settings = json.loads(text.tensor_proto.string_val[0])
    assert (settings["learning_rate"], settings["batch_size"], settings["epochs"], settings["seed"]) == (1e-2, 2, 1, 0)
    assert (settings["arm"], settings["ella"]["ella_lambda"], settings["model"]["r"]) == ("ella", 1e2, 4)
    assert settings["tasks"] == ["things", "beings"] and "num_train_epochs" not in settings


def test_one_tensorboard_folder_for_all_has_one_for_each(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "all"))
    for name in ("a", "b"):
        with Tracker(["tensorboard"], tmp_path / name, name) as tracker:
            tracker.begin(object(), 0)
            tracker.step(0, 1.0, 0.0)
    for name in ("a", "b"):
        assert written(tmp_path / "all" / name).Tags()["scalars"] == ["train/loss", "train/penalty"]


class Store:
    """What W&B and MLflow are: a process has at most one run open."""

    def __init__(self):
        self.runs, self.open = {}, None

    def begin(self, name):
        self.runs[name], self.open = "open", name

    def end(self, status="FINISHED"):
        if self.open:
            self.runs[self.open], self.open = status, None


class Callback:
    """What transformers does with such a run; ``_auto_end_run`` is that of its MLflowCallback."""

    def __init__(self, store, ends):
        self.store = store
        if ends:
            self._auto_end_run = True

    def on_train_begin(self, arguments, *_, **__):
        if self.store.open is None or os.getenv("MLFLOW_NESTED_RUN"):
            self.store.begin(arguments.run_name)

    def on_train_end(self, *_, **__):
        if getattr(self, "_auto_end_run", False):
            self.store.end()

    __del__ = on_train_end


@pytest.fixture
def stores(monkeypatch):
    """Stand-ins for the packages, which are no dependency of the tests."""
    wandb, mlflow = Store(), Store()

    class Wandb:
        run = property(lambda self: wandb.open and SimpleNamespace(id=wandb.open))

        def finish(self, exit_code=0):
            wandb.end({0: "FINISHED", 1: "FAILED"}[exit_code])

    def active_run():
        return mlflow.open and SimpleNamespace(info=SimpleNamespace(run_id=mlflow.open))

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(active_run=active_run, end_run=mlflow.end))
    monkeypatch.setattr(tracking, "_callbacks", lambda _: [Callback(wandb, False), Callback(mlflow, True)])
    return wandb, mlflow


def track(folder, name, error=None):
    with suppress(ZeroDivisionError), Tracker(["wandb", "mlflow"], folder, name) as tracker:
        tracker.begin(object(), 0)
        if error:
            raise error
    return tracker


def test_each_run_is_one_of_its_own_and_ends_as_it_did(stores, tmp_path):
    kept = [track(tmp_path, name, error) for name, error in (("a", None), ("b", ZeroDivisionError()), ("c", None))]
    for store in stores:
        assert store.runs == {"a": "FINISHED", "b": "FAILED", "c": "FINISHED"}
    # Trackers that are collected later leave the run of a later one open.
    for store in stores:
        store.begin("d")
    kept.clear()
    gc.collect()
    assert [store.open for store in stores] == ["d", "d"]


def test_a_process_that_is_ended_closes_its_run(stores, tmp_path, monkeypatch):
    handlers = {}
    monkeypatch.setattr("signal.signal", handlers.__setitem__)
    monkeypatch.setattr(compare, "prepare_process", lambda threads: None)
    monkeypatch.setattr(compare.tqdm, "set_lock", lambda lock: None)
    compare._worker(None, 1, [])
    assert not handlers
    compare._worker(None, 1, ["mlflow"])
    with pytest.raises(SystemExit), Tracker(["wandb", "mlflow"], tmp_path, "a") as tracker:
        tracker.begin(object(), 0)
        handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert all(store.runs == {"a": "FAILED"} for store in stores)


def test_an_open_run_is_used_and_stays_open(stores, tmp_path):
    for store in stores:
        store.begin("outer")
    track(tmp_path, "a")
    track(tmp_path, "b", ZeroDivisionError())
    gc.collect()
    assert all(store.runs == {"outer": "open"} and store.open == "outer" for store in stores)


def test_an_integration_that_fails_keeps_no_other_open(stores, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no server")

    for event in ("on_train_begin", "on_train_end"):
        with monkeypatch.context() as patch:
            tracker = Tracker(["wandb", "mlflow"], tmp_path, event)
            patch.setattr(tracker._callbacks[1], event, fail)
            with pytest.raises(ConnectionError, match="no server"), tracker:
                tracker.begin(object(), 0)
    assert [store.open for store in stores] == [None, None]
    assert stores[0].runs == {"on_train_begin": "FAILED", "on_train_end": "FINISHED"}


@pytest.mark.parametrize("name, made", [(None, []), ("there", []), ("new", ["new"])])
def test_the_store_is_made_before_several_processes_use_it(monkeypatch, name, made):
    asked, created = [], []
    client = SimpleNamespace(
        get_experiment_by_name=lambda name: asked.append(name) or (name in ("Default", "there") or None),
        create_experiment=created.append,
    )
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda: client))
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    if name:
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    make_stores(["tensorboard", "mlflow"])
    assert (asked, created) == ([name or "Default"], made)


def test_a_store_that_cannot_be_used_is_said_before_anything_runs(bert, tmp_path, monkeypatch):
    def client():
        raise RuntimeError("no such server")

    mlflow = SimpleNamespace(MlflowClient=client, get_tracking_uri=lambda: "http://there")
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr(tracking, "_callbacks", lambda _: [])
    spec = parse_spec({"model": {"path": str(bert)}, "tasks": {"docstrings": ["numpy"]}}, tmp_path)
    with pytest.raises(OSError, match="mlflow cannot use http://there: no such server"):
        compare.run_cells(spec, spec.cells(), out_dir=tmp_path / "out", title="t", notes={}, report_to=["mlflow"])
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    class Recorder:
        def __init__(self):
            self.heard = []

        def __getattr__(self, event):
            def hear(arguments, state, control, model=None, logs=None):
                assert arguments.run_name == "name" and model is not None
                self.heard.append((event.removeprefix("on_"), state.global_step, sorted(logs or ())))

            return hear

    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    recorders = [Recorder() for _ in range(4)]
    monkeypatch.setattr(tracking, "_callbacks", lambda report_to: [recorders.pop()])
    kept = recorders[::-1]

    def tracker():
        return Tracker(["any"], tmp_path, "name")

    step, (first, second) = ["loss", "penalty"], (["eval_things"], ["eval_beings", "eval_things"])
    with pytest.raises(Stop):
        run(tracker(), on_task_end=stop)
    assert kept[0].heard == [
        ("train_begin", 0, []),
        ("log", 0, step),
        ("log", 10, step),
        ("log", 12, sorted([*first, "eval_seen"])),
        ("train_end", 12, []),
    ]
    run(tracker())
    assert kept[1].heard == [
        ("train_begin", 12, []),
        ("log", 12, step),
        ("log", 22, step),
        ("log", 24, sorted([*second, "eval_seen"])),
        ("train_end", 24, []),
    ]
    # A finished run is read only.
    run(tracker())
    assert kept[2].heard == []
