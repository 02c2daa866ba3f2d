"""The generated sections of README.md and docs/ are what the committed results say, and nothing else."""

import pytest

from bench.headline import MARKS, best_row, lines
from bench.readme import DOCUMENTS, SUMMARY, committed, main, refreshed, replace_section, section, summary
from bench.rows import Row

from .test_compare import results


def layer(provider: str, ratio: float | None, mode: str = "both", **changes) -> Row:
    fields = {"median": 1e-3, "p20": 1e-3, "p80": 1e-3, "error": 1e-7, "gate": 1e-5, "held_bytes": 2**20}
    fields |= {"ratio": ratio, "ratio_p20": ratio, "ratio_p80": ratio} | changes
    return Row("layer", MARKS[0].case, mode, provider, **fields)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_and_committed_results_agree(path):
    assert refreshed(path) == path.read_text(encoding="utf-8"), "run `make bench-readme`"


def test_check_names_every_document(capsys):
    assert main(["--check"]) == 0
    assert capsys.readouterr().out.count("agrees with bench/results") == len(DOCUMENTS) == 4


def test_the_summary_has_six_rows_at_most_and_a_losing_one_among_them():
    text = summary(committed()[0], None)
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(SUMMARY) <= 6
    assert any("| 0." in row for row in rows) and any("not run: would need" in row for row in rows)
    assert "make bench" in text and committed()[0]["machine"]["name"] in text


def test_the_summary_follows_its_results():
    base, ours = layer("dense eager", 1.0, "in-place"), layer("ours auto, torch", 120.0, "in-place")
    assert "120× (120× … 120×)" in summary(results(base, ours), None)
    assert "121×" in summary(results(base, layer("ours auto, torch", 121.0, "in-place")), None)
    assert summary(None, None).count("not measured yet") == 2 and "|" not in summary(None, None)
    gpu = results(layer("ours gram, triton", 60.0), name="a GPU")
    assert "**GPU**: a GPU" in summary(None, gpu) and "docs/benchmarks.md" in summary(None, gpu)


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


START, END = "<!-- x:start -->", "<!-- x:end -->"


@pytest.mark.parametrize("text", ["no markers", f"{START} {START} {END}", f"{END} {START}"])
def test_a_document_without_markers_is_refused(text):
    with pytest.raises(ValueError, match="exactly once"):
        replace_section(text, "x", "new")
    assert replace_section(f"a\n{START}\nold{END}\nb", "x", "new\n") == f"a\n{START}\nnew\n{END}\nb"
