"""Reports that were made in parts are one report of all runs, and of nothing that should not stand in one table."""

from __future__ import annotations

import json
import math

import pytest

from bench.gather import gather, main
from ella.continual.metrics import AccuracyMatrix
from ella.continual.report import write_report
from ella.continual.stream import StreamConfig, StreamResult

ENV = {"machine": "a machine", "system": "Linux x86_64", "python": "3", "versions": {"torch": "2"}, "commit": "c0"}


def part(folder, command: str, *cells: tuple[str, int, float], tasks=("a", "b"), commits=(), **settings):
    results = [
        StreamResult(
            StreamConfig(arm=arm, order="o", seed=seed, **settings).to_dict(),
            AccuracyMatrix(list(tasks), [[score, 0.0], [score, score]]),
            [{"name": t, "steps": 1, "seconds": 1.0, "penalty_seconds": 0.0, "evaluation_seconds": 1.0} for t in tasks],
            commits=list(commits),
        )
        for arm, seed, score in cells
    ]
    write_report(folder, results, title="t", notes={}, env=ENV | {"command": command})
    return folder / "report.json"


def test_parts_become_one_report(tmp_path):
    first = part(tmp_path / "1", "first --out 'a b' --quiet", ("ella", 0, 10.0), ("inclora", 0, 20.0))
    second = part(tmp_path / "2", "second", ("inclora", 1, 40.0), ("ella", 0, 30.0), commits=["c1"])
    main([str(tmp_path / "all"), str(first), str(second)])
    report = json.loads((tmp_path / "all" / "report.json").read_text())
    assert report["arms"]["inclora"]["per_seed"]["OA"] == [20.0, 40.0]
    # What both hold is the last one's.
    assert report["arms"]["ella"]["per_seed"]["OA"] == [30.0]
    assert (
        report["environment"]["command"] == "first --quiet; second" and report["environment"]["machine"] == "a machine"
    )
    found = {(run["config"]["arm"], run["config"]["seed"]): run["commits"] for run in report["runs"]}
    assert found == {("ella", 0): ["c1"], ("inclora", 0): ["c0"], ("inclora", 1): ["c1"]}
    assert "commit c1, c0" in (tmp_path / "all" / "report.md").read_text()
    main([str(tmp_path / "some"), str(first), str(second), "--seeds", "0", "--orders", "o"])
    runs = json.loads((tmp_path / "some" / "report.json").read_text())["runs"]
    assert sorted(run["config"]["arm"] for run in runs) == ["ella", "inclora"]


def test_what_does_not_belong_together_is_refused(tmp_path):
    first = part(tmp_path / "1", "x", ("ella", 0, 10.0))
    other = part(tmp_path / "2", "x", ("ella", 1, 10.0), tasks=("a", "c"))
    with pytest.raises(ValueError, match=r"ella ran over \['a', 'c'\], others over \['a', 'b'\]"):
        gather(tmp_path / "all", [first, other])
    slower = part(tmp_path / "3", "x", ("ella", 1, 10.0), learning_rate=1e-4)
    with pytest.raises(ValueError, match=r"ella is not of one setting: learning_rate was 0\.002, now 0\.0001"):
        gather(tmp_path / "all", [first, slower])
    with pytest.raises(ValueError, match=r"at least one report\.json"):
        gather(tmp_path / "all", [])
    with pytest.raises(ValueError, match=r"no runs of orders \['long-4'\] and seeds None"):
        gather(tmp_path / "all", [first], ["long-4"])
    assert not (tmp_path / "all").exists()


def test_training_alone_is_known_to_all_parts(tmp_path):
    first = part(tmp_path / "1", "x", ("ella", 0, 50.0), ("ella", 1, 50.0))
    alone = part(tmp_path / "2", "x", ("alone", 0, 40.0))
    found = {(r.arm, r.seed): r.matrix.forward_transfer_learning() for r in gather(tmp_path / "all", [first, alone])}
    assert found["ella", 0] == 10.0 and math.isnan(found["ella", 1])


def test_a_field_newer_than_a_run_is_no_difference(tmp_path):
    first = part(tmp_path / "1", "x", ("ella", 0, 10.0))
    older = json.loads(first.read_text())
    del older["runs"][0]["config"]["ella"]["penalty_energies"]
    first.write_text(json.dumps(older))
    second = part(tmp_path / "2", "x", ("ella", 1, 10.0))
    assert len(gather(tmp_path / "all", [first, second])) == 2
