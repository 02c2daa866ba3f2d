"""Arms and seeds side by side, on a model small enough to train in the test."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from ella.config import EllaConfig
from ella.continual.compare import Cell, CellsFailed, check_cells, compare_arms, render_text, run_cells, share_alone
from ella.continual.metrics import AccuracyMatrix
from ella.continual.models import LoraSettings, build_classifier
from ella.continual.spec import parse_spec
from ella.continual.stream import StreamConfig, StreamResult

from . import tiny
from .test_report import assert_self_contained
from .test_tasks import write_task

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


def test_training_alone_is_of_the_same_training():
    def result(arm, label, own, **changes):
        matrix = AccuracyMatrix(["a", "b"], untrained=[0.0, 0.0])
        for row in ([own, 0.0], [own, own]):
            matrix.add_row(row)
        return StreamResult(StreamConfig(arm=arm, label=label, **changes).to_dict(), matrix)

    short, long = result("alone", "", 50.0), result("alone", "alone long", 90.0, epochs=6)
    other, longer = result("seqlora", "", 40.0), result("seqlora", "long", 80.0, epochs=6)
    slower = result("seqlora", "slow", 30.0, learning_rate=1e-4)
    del other.config["lr_scheduler_type"]  # as one saved before there was a choice
    for results in ([short, long, other, longer, slower], [other, longer, slower, long, short]):
        share_alone(results)
        assert (other.matrix.alone, longer.matrix.alone, slower.matrix.alone) == ([50.0, 50.0], [90.0, 90.0], None)


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


def test_the_references_alone_and_one_task_alone(compare):
    _, text = compare(("alone", "joint"))
    assert "an adapter per task, seed 0: mean accuracy" in text and "nan" not in text
    assert re.search(r"joint training, seed 0: OA \d+\.\d; 2 of 2", text)
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


# --- a grid of a stream file -----------------------------------------------------------------------------------------


@pytest.fixture
def grid(bert, tmp_path):
    """A stream of two orders and one seed, with the arms that are given."""
    for task in tiny.two_tasks(n_train=24, n_test=8):
        write_task(tmp_path / "data" / "TC" / task.name, task.labels, train=task.train, dev=None, test=task.test)

    def spec(*arms):
        orders = [{"name": name, "tasks": name.split("+")} for name in ("things+beings", "beings+things")]
        return parse_spec(
            {
                "model": {"path": str(bert), "max_length": 32},
                "lora": {"r": 4, "alpha": 8},
                "tasks": {"benchmark": "data", "orders": orders},
                "arms": list(arms),
                "ella": {"ella_lambda": 1.0, "normalize": "rms"},
                "training": {"batch_size": 8, "learning_rate": 1e-2},
            },
            tmp_path,
        )

    return spec


def run(spec, out_dir, **options):
    said = []
    try:
        run_cells(spec, spec.cells(), out_dir=out_dir, title="t", notes={}, progress=False, echo=said.append, **options)
        failed = ""
    except CellsFailed as error:
        failed = str(error)
    runs = json.loads((out_dir / "report.json").read_text(encoding="utf-8"))["runs"]
    return {(r["config"]["order"], r["config"]["label"]): r["matrix"] for r in runs}, "\n".join(said), failed


STRONG = {"arm": "ella", "as": "strong", "ella_lambda": 1e2}
BROKEN = {"arm": "inclora", "as": "broken", "learning_rate": 1e30}


@pytest.mark.slow
def test_two_processes_do_as_one(grid, tmp_path):
    spec = grid("inclora", BROKEN, STRONG)
    one, _, failed = run(spec, tmp_path / "one")
    two, text, also = run(spec, tmp_path / "two", jobs=2)
    assert list(one) == [(o, a) for o in ("things+beings", "beings+things") for a in ("", "strong")]
    assert two == one and one["things+beings", ""] != one["things+beings", "strong"]
    assert failed.startswith(
        "2 of 6 runs failed; the same command tries them again\n  things+beings-broken-0: training"
    )
    assert also == failed.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    assert text.count("failed: training diverged in broken/0 1/2") == 2 and "; 6 of 6" in text
    assert "inclora" not in text and "IncLoRA, things+beings, seed 0: OA" in text and " left\n" in text
    trace = (tmp_path / "two" / "runs" / "beings+things-broken-0" / "traceback.txt").read_text(encoding="utf-8")
    assert "_check_training" in trace and "try a lower learning_rate" in trace

    # Again, with what was wrong put right: only that is run.
    again, _, failed = run(grid("inclora", {**BROKEN, "learning_rate": 1e-2}, STRONG), tmp_path / "two")
    assert failed == "" and {key: again[key] for key in one} == one
    # Another label is another run, of the same numbers.
    assert [again[order, "broken"] for order, _ in one] == [again[order, ""] for order, _ in one]
    assert not list((tmp_path / "two" / "runs").glob("*/traceback.txt"))


def test_what_is_finished_is_not_trained_again(grid, tmp_path, monkeypatch):
    from ella.continual import stream

    trained, train = [], stream._train
    monkeypatch.setattr(
        stream, "_train", lambda arm, config, *a: (trained.append(config.name), train(arm, config, *a))[1]
    )
    run(grid("inclora", BROKEN), tmp_path / "out")
    assert trained == ["inclora", "inclora", "broken"] * 2
    trained.clear()
    run(grid("inclora", {**BROKEN, "learning_rate": 2e-2}), tmp_path / "out")
    assert trained == ["broken"] * 4


def test_a_damaged_state_is_one_failed_run(grid, tmp_path):
    run(grid("inclora", STRONG), tmp_path)
    (tmp_path / "runs" / "things+beings-strong-0" / "progress.json").write_text("{")
    found, _, failed = run(grid("inclora", STRONG), tmp_path)
    assert len(found) == 3 and failed.startswith("1 of 4 runs failed") and "is not the progress of a run" in failed


def test_names_of_folders():
    def name(label, order="", seed=0):
        return Cell(replace(CONFIG, label=label, order=order, seed=seed), ("a",)).name

    assert name("") == "ella-0" and name("λ=1e-3"[1:], "long-4", 12) == "long-4-=1e-3-12"
    odd = [name(label) for label in ("a b", "a/b", "a_b", ".a", "_a", "../a", "é", "\udce9", "x" * 300)]
    assert len(set(odd)) == len(odd) and all(re.fullmatch(r"[A-Za-z0-9_=+-][A-Za-z0-9_.=+-]{0,99}", n) for n in odd)
    for pair in (("b-c", "a"), ("c", "a-b")), (("A", ""), ("a", "")):
        cells = [Cell(replace(CONFIG, label=label, order=order), ("a",)) for label, order in pair]
        with pytest.raises(ValueError, match=r"the runs \(order, label, seed\) .* would share the folder"):
            check_cells(cells)
    with pytest.raises(ValueError, match="no runs"):
        check_cells([])


def test_integrations_are_told_of_each_run(grid, tmp_path):
    spec = grid("inclora")
    run(spec, tmp_path / "out", report_to=["tensorboard"])
    for cell in spec.cells():
        (file,) = cell.folder(tmp_path / "out").glob("runs/*/events.*")
        assert b"eval/beings" in file.read_bytes()


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("abacus", ValueError, "abacus is not supported, only .*tensorboard"),
        ("tensorboard", ImportError, "TensorBoardCallback requires tensorboard to be installed"),
    ],
)
def test_an_integration_that_is_not_there(grid, tmp_path, monkeypatch, name, error, message):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    spec, out_dir = grid("ella"), tmp_path / "out"
    with pytest.raises(error, match=message):
        run_cells(spec, spec.cells(), out_dir=out_dir, title="t", notes={}, report_to=[name])
    assert not out_dir.exists()
