"""OA, BWT and both FWT against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest

from ella.continual import AccuracyMatrix

NAN = float("nan")
ROWS = [[80.0, 30.0, NAN], [70.0, 90.0, 20.0], [50.0, 85.0, 60.0]]


def matrix(**extra) -> AccuracyMatrix:
    return AccuracyMatrix(["a", "b", "c"], [list(row) for row in ROWS], **extra)


def test_overall_accuracy_and_backward_transfer():
    m = matrix()
    assert m.overall_accuracy() == pytest.approx((50 + 85 + 60) / 3)
    assert m.backward_transfer() == pytest.approx(((50 - 80) + (85 - 90)) / 2)


def test_both_forward_transfers():
    m = matrix(untrained=[10.0, 25.0, 15.0], alone=[80.0, 88.0, 65.0])
    # R[1][2] - untrained and R[2][3] - untrained, 1-based.
    assert m.forward_transfer_zero_shot() == pytest.approx(((30 - 25) + (20 - 15)) / 2)
    # The diagonal against training alone, from the second task on.
    assert m.forward_transfer_learning() == pytest.approx(((90 - 88) + (60 - 65)) / 2)
    assert m.summary() == {
        "OA": m.overall_accuracy(),
        "BWT": m.backward_transfer(),
        "FWT_zero_shot": m.forward_transfer_zero_shot(),
        "FWT_learning": m.forward_transfer_learning(),
    }


def test_what_was_not_measured_is_nan():
    m = matrix()
    assert math.isnan(m.forward_transfer_zero_shot()) and math.isnan(m.forward_transfer_learning())
    hole = AccuracyMatrix(["a", "b"], [[80.0, NAN], [NAN, 70.0]], untrained=[1.0, 2.0])
    assert math.isnan(hole.overall_accuracy()) and math.isnan(hole.backward_transfer())
    assert math.isnan(hole.forward_transfer_zero_shot())


def test_a_single_task_has_no_transfer():
    m = AccuracyMatrix(["a"], [[75.0]], untrained=[5.0], alone=[75.0])
    assert m.overall_accuracy() == 75.0
    assert all(math.isnan(v) for k, v in m.summary().items() if k != "OA")


def test_an_unfinished_matrix_has_no_metrics():
    m = AccuracyMatrix(["a", "b"])
    assert not m.complete
    m.add_row([50, NAN])
    for metric in (m.overall_accuracy, m.backward_transfer, m.forward_transfer_zero_shot, m.summary):
        with pytest.raises(ValueError, match="1 of 2 tasks are finished"):
            metric()
    m.add_row([40, 60])
    assert m.complete
    with pytest.raises(ValueError, match="all 2 tasks already have a row"):
        m.add_row([0, 0])


def test_wrong_lengths_are_named():
    with pytest.raises(ValueError, match="row 0 has 1 entries; expected one per task, 2"):
        AccuracyMatrix(["a", "b"], [[1.0]])
    with pytest.raises(ValueError, match="alone has 3 entries"):
        AccuracyMatrix(["a", "b"], alone=[1.0, 2.0, 3.0])


def test_curves_start_at_the_own_task_and_skip_holes():
    m = AccuracyMatrix(["a", "b", "c"], [[80, 30, NAN], [NAN, 90, NAN], [50, 85, 60]])
    assert m.curve(0) == [(0, 80.0), (2, 50.0)]
    assert m.curve(1) == [(1, 90.0), (2, 85.0)]


def test_json_round_trip_is_strict_json():
    m = matrix(untrained=[10.0, NAN, 15.0])
    text = json.dumps(m.to_dict(), allow_nan=False)
    back = AccuracyMatrix.from_dict(json.loads(text))
    assert back.to_dict() == m.to_dict() and back.alone is None
    assert math.isnan(back.rows[0][2]) and math.isnan(back.untrained[1])
