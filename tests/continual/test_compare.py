"""Arms and seeds side by side, on a model small enough to train in the test."""

from __future__ import annotations

import json
import math

import pytest

from ella.config import EllaConfig
from ella.continual.compare import compare_arms, render_text
from ella.continual.models import LoraSettings, build_classifier
from ella.continual.stream import StreamConfig

from . import tiny
from .test_report import assert_self_contained

CONFIG = StreamConfig(batch_size=8, learning_rate=1e-2, ella=EllaConfig(1.0, normalize="rms"))


@pytest.fixture
def compare(bert, tmp_path):
    said, built, draws = [], [], []

    def build():
        built.append(build_classifier(bert, lora=LoraSettings(r=4, alpha=8)))
        return built[-1]

    def tasks_of_seed(seed):
        draws.append(seed)
        return [task.subset(16, 8, seed) for task in tiny.two_tasks(n_train=64, n_test=32)]

    def run(arms, seeds=(0,), tasks=tasks_of_seed):
        results = compare_arms(
            build,
            tasks,
            CONFIG,
            arms=arms,
            seeds=seeds,
            out_dir=tmp_path,
            title="t",
            notes={},
            progress=False,
            echo=said.append,
        )
        return results, "\n".join(said)

    run.folder, run.built, run.draws = tmp_path, built, draws
    return run


def test_all_arms_and_two_seeds(compare):
    results, text = compare(("seqlora", "inclora", "ella", "alone"), (0, 1))
    assert [(r.arm, r.seed) for r in results] == [
        (a, s) for s in (0, 1) for a in ("seqlora", "inclora", "ella", "alone")
    ]
    assert compare.draws == [0, 1] and len(compare.built) == 8
    for r in results:
        alone = next(o for o in results if o.arm == "alone" and o.seed == r.seed)
        assert r.matrix.alone == [alone.matrix.rows[0][0], alone.matrix.rows[1][1]]
        if r.arm != "alone":
            own = r.matrix.rows[1][1] - r.matrix.alone[1]
            assert r.matrix.forward_transfer_learning() == pytest.approx(own)
            assert not any(math.isnan(v) for v in r.matrix.summary().values())
    for expected in ("SeqLoRA", "FWT**", "the penalty takes", "its state:", "report:", "an adapter per task"):
        assert expected in text
    assert "nan" not in text
    assert_self_contained((compare.folder / "report.html").read_text(encoding="utf-8"))
    assert len(json.loads((compare.folder / "report.json").read_text(encoding="utf-8"))["runs"]) == 8
    assert len(list((compare.folder / "runs").iterdir())) == 8


def test_arms_measure_the_untrained_model_once(compare, monkeypatch):
    from ella.continual.models import EncoderClassifier

    counts = []
    original = EncoderClassifier.accuracy
    monkeypatch.setattr(EncoderClassifier, "accuracy", lambda *a: (counts.append(1), original(*a))[1])
    (fresh, one), _ = compare(("inclora", "seqlora"))
    assert fresh.matrix.untrained == one.matrix.untrained
    assert len(counts) == 2 + 4 + 4  # untrained once, then two rows of two for both arms


def test_a_second_call_takes_what_is_there(compare):
    first, _ = compare(("inclora",))
    second, _ = compare(("inclora", "ella"))
    assert second[0].to_dict() == first[0].to_dict() and second[1].arm == "ella"


def test_the_reference_arm_alone_and_one_task_alone(compare):
    _, text = compare(("alone",))
    assert "an adapter per task, seed 0: mean accuracy" in text and "nan" not in text
    (compare.folder / "again").mkdir()
    _, text = compare(("inclora",), (7,), lambda seed: tiny.two_tasks(n_train=8, n_test=8)[:1])
    assert "seed 7: OA" in text and "nan" not in text


@pytest.mark.parametrize(
    "arms, seeds, message",
    [
        (("inclora", "swim"), (0,), "arm is 'swim'; expected one of"),
        ((), (0,), r"arms must be at least one and distinct, found \[\]"),
        (("ella", "ella"), (0,), "arms must be at least one and distinct"),
        (("ella",), (), "seeds must be at least one"),
        (("ella",), (1, 1), r"seeds must be .* distinct, found \[1, 1\]"),
    ],
)
def test_wrong_arms_are_said_before_any_work(compare, arms, seeds, message):
    with pytest.raises(ValueError, match=message):
        compare(arms, seeds)
    assert compare.built == [] and list(compare.folder.iterdir()) == []


def test_text_of_a_run_without_ella(compare):
    results, _ = compare(("inclora",))
    text = render_text(results)
    assert "after things" in text and "its state" not in text and "nan" not in text
