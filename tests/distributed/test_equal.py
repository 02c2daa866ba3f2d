"""Every engine ends where one process ends."""

from __future__ import annotations

import pytest

from tests.distributed.launch import run
from tests.distributed.models import difference

KINDS, ACCUMULATIONS = ("llama", "t5"), ("1", "4")


def loops(engine, strength="0.01", **options):
    return [f"loops:one_task:{kind}:{engine}:{n}:{strength}" for kind in KINDS for n in ACCUMULATIONS]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(1, [*loops("fsdp2"), *loops("fsdp2", "0")], tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module", params=[2, 4])
def together(request, tmp_path_factory):
    return run(request.param, [*loops("fsdp2"), *loops("ddp")], tmp_path_factory.mktemp("together") / "run")


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_a_loop_equals_one_process(alone, together, engine, kind, accumulation):
    (wanted,) = alone[f"loops:one_task:{kind}:fsdp2:{accumulation}:0.01"]
    (without,) = alone[f"loops:one_task:{kind}:fsdp2:{accumulation}:0"]
    for found in together[f"loops:one_task:{kind}:{engine}:{accumulation}:0.01"]:
        assert difference(found["weights"], wanted["weights"]) < 1e-6
        for (penalty, norm), (wanted_penalty, wanted_norm) in zip(found["steps"], wanted["steps"], strict=True):
            assert penalty == pytest.approx(wanted_penalty, rel=1e-6) and penalty > 0
            assert norm == pytest.approx(wanted_norm, rel=1e-6)
        assert found["values"] == pytest.approx(wanted["values"], rel=1e-6)
        assert difference(found["weights"], without["weights"]) > 1e-3, "the penalty switched off must be noticed"
