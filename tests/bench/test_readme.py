"""The README's performance section is what the committed results say, and nothing else."""

import pytest

from bench.headline import MARKS, best_row, lines
from bench.readme import END, README, START, refreshed, replace_section, section
from bench.rows import Row

from .test_compare import results


def layer(provider: str, ratio: float | None, mode: str = "both", **changes) -> Row:
    fields = {"median": 1e-3, "p20": 1e-3, "p80": 1e-3, "error": 1e-7, "gate": 1e-5, "held_bytes": 2**20}
    fields |= {"ratio": ratio, "ratio_p20": ratio, "ratio_p80": ratio} | changes
    return Row("layer", MARKS[0].case, mode, provider, **fields)


def test_readme_and_committed_results_agree():
    text = README.read_text(encoding="utf-8")
    assert refreshed(text) == text, "run `make bench-readme`"


def test_a_changed_number_changes_the_section():
    ours = layer("ours auto, torch", 120.0)
    before = section(results(layer("dense eager", 1.0), ours), None)
    ours.ratio = 121.0
    assert "120× (120× … 120×)" in before
    assert section(results(layer("dense eager", 1.0), ours), None) != before


def test_nothing_measured_is_said_and_nothing_is_estimated():
    text = section(None, None)
    assert text.count("not measured yet") == 2 and "|" not in text


def test_losing_rows_are_in_the_section():
    text = section(results(layer("dense eager", 1.0), layer("ours auto, torch", 0.4)), None)
    assert "loses to dense eager" in text and "0.4×" in text and "not reached" in text


def test_a_gpu_run_has_its_table():
    gpu = results(layer("ours gram, triton", 60.0), name="a GPU")
    text = section(None, gpu)
    assert "**GPU**: a GPU" in text and "ours gram, triton" in text and "60×" in text


def test_marks_count_exact_ways_of_ours_alone():
    rows = results(
        layer("dense compiled", 500.0),
        layer("ours spectral, torch", 400.0),
        layer("ours gram, torch", 110.0, "in-place"),
        layer("ours auto, torch", 90.0),
        layer("ours stream, torch", 300.0, "forward"),
    )
    assert best_row(rows["rows"], "layer", MARKS[0].case)["provider"] == "ours gram, torch"
    said = lines(rows)
    assert "110×" in said[0] and said[0].endswith("wanted 100×, reached")
    assert said[-1].endswith("not measured, wanted 25×")


@pytest.mark.parametrize("text", ["no markers", f"{START} {START} {END}", f"{END} {START}"])
def test_a_readme_without_markers_is_refused(text):
    with pytest.raises(ValueError, match="exactly once"):
        replace_section(text, "x")
    assert replace_section(f"a\n{START}\nold{END}\nb", "new\n") == f"a\n{START}\nnew\n{END}\nb"
