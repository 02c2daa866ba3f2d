"""A rank is killed in the middle of a task; all start again from the last checkpoint."""

from __future__ import annotations

import pytest

from tests.distributed.launch import run
from tests.distributed.models import difference

ENGINES = ["ddp", "fsdp2", "fsdp2-sharded", "zero2", "zero3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of the unbroken runs and of the resumed ones, by engine."""
    place = tmp_path_factory.mktemp("resume")

    def case(engine, what):
        folder = place / (engine if what != "unbroken" else f"{engine}-unbroken")
        return f"trainers:resumable:llama:{engine}:{folder}:{what}"

    for engine in ENGINES:
        with pytest.raises(RuntimeError, match=r"ranks ended with .*9"):
            run(2, [case(engine, "killed")], place / f"killed-{engine}")
    found = run(
        2, [case(engine, what) for what in ("unbroken", "resumed") for engine in ENGINES], place / "others", 400
    )
    return {engine: [found[case(engine, what)] for what in ("unbroken", "resumed")] for engine in ENGINES}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_ends_where_an_unbroken_one_ends(runs, engine):
    for unbroken, resumed in zip(*runs[engine], strict=True):
        assert resumed["tasks"] == unbroken["tasks"] == ["before"]
        assert difference(resumed["weights"], unbroken["weights"]) < 1e-6
        assert difference(resumed["past"], unbroken["past"]) < 1e-6
        assert resumed["logged"] == pytest.approx(unbroken["logged"], rel=1e-6)
