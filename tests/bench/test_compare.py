"""`ella bench --compare`: the ratio per row, its spread, and what it refuses to call a change."""

import doctest
import json

import pytest

from bench import tables
from bench.compare import compare, main, markdown
from bench.rows import Row
from bench.tables import SCHEMA
from ella.cli import main as ella

from .test_gates import MACHINE


def results(*rows: Row, **machine) -> dict:
    facts = MACHINE | {"device": "cpu"} | machine
    return {"schema": SCHEMA, "machine": facts, "rows": [row.as_dict() for row in rows]}


def row(case: str, seconds: float, spread: float = 0.1, **changes) -> Row:
    fields = {"median": seconds, "p20": seconds * (1 - spread), "p80": seconds * (1 + spread)} | changes
    return Row("layer", case, "both", "ours", **fields)


def test_the_units_of_the_docstrings():
    assert doctest.testmod(tables) == (0, 2)


def test_ratio_and_spread_per_row():
    before = results(row("a", 2.0), row("b", 1.0), row("c", 1.0))
    after = results(row("a", 1.0), row("b", 1.05), row("c", 3.0))
    a, b, c = compare(before, after)
    assert a.ratio == 2.0 and a.low == pytest.approx(1.8 / 1.1) and a.high == pytest.approx(2.2 / 0.9)
    assert [change.verdict for change in (a, b, c)] == ["faster", "same", "slower"]
    text = markdown(before, after)
    assert "1 faster, 1 slower, 1 same" in text and "| layer, a, both, ours | 2.00 s | 1.00 s | 2× |" in text


def test_rows_of_one_side_and_rows_without_speed_are_said():
    red = row("red", 1.0, median=None, p20=None, p80=None, reason="red: relative error 1e-1 exceeds 1e-05")
    changes = compare(results(row("a", 1.0), row("red", 1.0)), results(red, row("new", 1.0)))
    notes = {change.key[1]: change.note for change in changes}
    assert notes == {"a": "not measured after", "red": f"after: {red.reason}", "new": "not measured before"}
    text = markdown(results(row("red", 1.0)), results(red))
    assert "0 faster, 0 slower, 0 same" in text and red.reason in text


def test_two_machines_are_not_compared_in_silence():
    same, other = results(row("a", 1.0)), results(row("a", 1.0), name="another")
    assert "machines differ" in markdown(same, other)
    assert "machines differ" not in markdown(same, same)


def test_a_file_that_is_no_results_file_is_refused(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"rows": []}))
    assert main([str(path), str(path)]) == 1
    assert "not a results file" in capsys.readouterr().err


def test_the_command_line_compares_and_says_where_the_suite_is(tmp_path, capfd, monkeypatch):
    for name, seconds in (("a.json", 2.0), ("b.json", 1.0)):
        (tmp_path / name).write_text(json.dumps(results(row("a", seconds))))
    monkeypatch.chdir(tmp_path)  # relative names are the caller's
    assert ella(["bench", "--compare", "a.json", "b.json"]) == 0
    assert "1 faster, 0 slower, 0 same" in capfd.readouterr().out
    assert ella(["bench", "--compare", "a.json", "missing.json"]) == 1
    assert ella(["bench"]) == 0
    assert "make bench" in capfd.readouterr().out
