"""What integrations of transformers are told of a run."""

from __future__ import annotations

import pytest

from ella.config import EllaConfig
from ella.continual import tracking
from ella.continual.models import LoraSettings, build_classifier
from ella.continual.stream import StreamConfig, run_stream
from ella.continual.tracking import Tracker

from . import tiny

CONFIG = StreamConfig(batch_size=2, learning_rate=1e-2, ella=EllaConfig(1e2, normalize="rms"))
STEPS = 12


@pytest.fixture
def run(bert, tmp_path):
    """One run of two tasks of twelve steps in ``tmp_path``."""

    def run(tracker, **options):
        try:
            tasks = tiny.two_tasks(n_train=2 * STEPS, n_test=8)
            classifier = build_classifier(bert, lora=LoraSettings(r=4, alpha=8))
            return run_stream(classifier, tasks, CONFIG, tmp_path, progress=False, tracker=tracker, **options)
        finally:
            tracker.close()

    return run


def test_tensorboard_holds_losses_and_scores(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(Tracker(["tensorboard"], tmp_path, "first"))
    (file,) = tmp_path.glob("runs/*/events.*")
    events = EventAccumulator(str(file))
    events.Reload()

    def scalars(name):
        return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)]

    (a, _), (b, c) = result.matrix.rows
    assert scalars("eval/things") == [(12, a), (24, b)] and scalars("eval/beings") == [(24, c)]
    assert scalars("eval/seen") == [(12, a), (24, (b + c) / 2)]
    assert [event.step for event in events.Scalars("train/loss")] == [0, 10, 12, 22]
    penalties = [event.value for event in events.Scalars("train/penalty")]
    # B of a fresh adapter is zero.
    assert penalties[:3] == [0, 0, 0] and penalties[3] > 0


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
