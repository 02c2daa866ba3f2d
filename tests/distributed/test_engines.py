"""Every engine ends two tasks where one process ends them."""

from __future__ import annotations

import pytest

from tests.distributed.conftest import ACCUMULATIONS, KINDS, LAYERS, LOOPS, trainers
from tests.distributed.models import STEPS, difference

AT_FOUR = [(kind, n, "four") for kind in ["llama"] for n in ACCUMULATIONS]


def check(found, wanted, without):
    assert len(found["steps"]) == 2 * STEPS
    assert found["steps"] == [pytest.approx(step, rel=1e-6, abs=1e-12) for step in wanted["steps"]]
    assert all(penalty > 0 for penalty, _ in found["steps"][STEPS + 1 :])
    for name in ("weights", "past"):
        assert difference(found[name], wanted[name]) < 1e-6
        assert difference(found[name], without[name]) > 1e-3, "the penalty switched off must be noticed"
    assert difference(found["fresh"] | found["past"], wanted["fresh"] | wanted["past"]) < 1e-6


@pytest.mark.parametrize("kind, accumulation, ranks", [(k, n, "two") for k in KINDS for n in ACCUMULATIONS] + AT_FOUR)
@pytest.mark.parametrize("engine", LOOPS)
def test_a_bare_loop_equals_one_process(alone, engine, kind, accumulation, ranks, request):
    (wanted,), (without,) = (alone[f"loops:two_tasks:{kind}:alone:{accumulation}:{s}"] for s in ("1.0", "0.0"))
    for found in request.getfixturevalue(ranks)[f"loops:two_tasks:{kind}:{engine}:{accumulation}:1.0"]:
        check(found, wanted, without)
        assert found["kept"] < 1e-5, "the end of a task changes no output"


def test_ddp_of_every_layer_equals_one_process(alone, two):
    (wanted,), (without,) = (alone[case] for case in LAYERS)
    first, second = two[LAYERS[0]]
    assert difference(second, first) == 0
    assert difference(first, wanted) < 1e-6
    assert difference(first, without) > 1e-3, "switching the penalty off must be noticed"


@pytest.mark.parametrize(
    "kind, accumulation, ranks, engine",
    [(*case, engine) for case in [(k, n, "two_trainers") for k in KINDS for n in ACCUMULATIONS] + AT_FOUR
     for engine in trainers(case[0])],
)  # fmt: skip
def test_a_trainer_equals_one_process(alone, engine, kind, accumulation, ranks, request):
    """With an evaluation in the middle of each task, and clipping."""
    (wanted,), (without,) = (alone[f"trainers:two_tasks:{kind}:alone:{accumulation}:{s}"] for s in ("1.0", "0.0"))
    for found in request.getfixturevalue(ranks)[f"trainers:two_tasks:{kind}:{engine}:{accumulation}:1.0"]:
        check(found, wanted, without)
