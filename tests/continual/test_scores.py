"""Metrics of written texts against numbers computed by hand."""

from __future__ import annotations

import doctest
import sys

import pytest

from ella.continual import scores
from ella.continual.scores import METRICS, check_metric, edit_similarity, rouge_l, sari, score


def test_sari_by_hand():
    """n = 1: keep a b of which a is right, delete c, add d. n = 2, 3: kept and added ones are wrong. n = 4: nothing."""
    keep = [2 * (1 / 2) * 1 / (1 / 2 + 1), 0, 1, 1]
    add = [1, 0, 0, 1]
    assert sari("a b c", "a b d", ["a d"]) == pytest.approx(100 * (sum(keep) + 4 + sum(add)) / 12)
    assert sari("the cat sat down", "The cat sat", ["the cat sat"]) == 100.0


def test_sari_of_words_that_repeat():
    """Of two kept x one is right: precision 1/2, recall 1; nothing is deleted or added, which is 0/0."""
    keep = [2 / 3, 0, 1, 1]
    assert sari("x x", "x x", ["x"]) == pytest.approx(100 * (sum(keep) + 4 + 4) / 12)


def test_sari_with_several_references():
    """The example that the metric is commonly documented with."""
    references = [
        "About 95 species are currently known .",
        "About 95 species are now accepted .",
        "95 species are now accepted .",
    ]
    found = sari("About 95 species are currently accepted .", "About 95 you now get in .", references)
    assert found == pytest.approx(26.953601953601954)


def test_rouge_and_edit_similarity():
    assert rouge_l("the cat sat", "the cat sat down") == pytest.approx(100 * 2 * 1 * 0.75 / 1.75)
    assert rouge_l("", "the cat") == 0.0
    # Two of eight characters are inserted or deleted.
    assert edit_similarity("abcd", "abxd") == pytest.approx(75.0)
    assert (
        edit_similarity("x = <NUM_LIT:3> + <NUM_LIT> + '<STR_LIT:a b>' + '<STR_LIT>'", "x = 3 + 0 + 'a b' + ''") == 100
    )


@pytest.mark.parametrize(
    "metric, outputs, expected",
    [
        ("choice", [" B\nBecause", "A", "C", ""], 50.0),
        ("exact", [" B because", "A ", "C", ""], 25.0),
        ("edit", ["B because", "A", "", "D"], 75.0),
        ("rouge-l", ["b because", "a", "c", ""], 50.0),
    ],
)
def test_means_in_percent(metric, outputs, expected):
    answers = ["B because", "A", "D", "D"]
    if metric == "exact":
        answers[0] = "B"
    assert score(metric, ["?"] * 4, outputs, answers) == pytest.approx(expected)


def test_the_source_of_sari_is_the_prompt():
    assert score("sari", ["a b c"], ["a b d"], ["a d"]) == sari("a b c", "a b d", ["a d"])


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"unknown metric 'bleu'; expected one of \['choice', 'edit', "):
        check_metric("bleu")
    for metric, package in (("rouge-l", "rouge_score"), ("edit", "rapidfuzz")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"'{metric}' needs {package}.*pip install 'ella-kernels\[trace\]'"):
            check_metric(metric)
    for metric in METRICS.keys() - {"rouge-l", "edit"}:
        check_metric(metric)


def test_the_example_runs():
    assert doctest.testmod(scores) == (0, 1)
