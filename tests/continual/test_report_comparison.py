"""What a report says of which method is better: sentences, order, holes, and several orders of tasks."""

from __future__ import annotations

import json
import math
import re

import pytest

from ella.continual.metrics import AccuracyMatrix
from ella.continual.report import (
    comparisons,
    render_html,
    render_markdown,
    render_text,
    summarise,
    write_report,
)
from ella.continual.report.summary import ranked
from ella.continual.stream import StreamResult

from .test_report import NAMES, NAN, OPTIONS, Page, figures, page, result, table_of


def scored(label: str, seed: int, final: float, arm="inclora", order="", bwt=-10.0) -> StreamResult:
    """A run of two tasks with overall accuracy ``final`` and backward transfer ``bwt``."""
    r = result(arm, seed, names=["x", "y"], label=label, order=order)
    r.matrix.rows = [[final - bwt, NAN], [final, final]]
    return r


def three_seeds(label: str, finals, **options) -> list[StreamResult]:
    return [scored(label, seed, final, **options) for seed, final in enumerate(finals)]


ELLA = three_seeds("", (70.0, 72.0, 74.0), arm="ella")


@pytest.mark.parametrize(
    "rivals, sentence",
    [
        # Differences 5, 6, 10: mean 7, standard deviation √7, standard error √(7/3).
        (((65.0, 66.0, 64.0),), "7.0 ± 1.5 points above x0, the best other method, ahead on 3 of 3 seeds."),
        # The best by mean, though x1 is better on two seeds.
        (
            ((80.0, 80.0, 80.0), (85.0, 85.0, 0.0)),
            "8.0 ± 1.2 points below x0, the best other method, ahead on 0 of 3 seeds.",
        ),
        (
            ((69.0, 73.0, 72.0),),
            "0.7 ± 0.9 points above x0, the best other method, ahead on 2 of 3 seeds; "
            "this difference is less than two standard errors.",
        ),
        (
            ((70.0, 72.0, 74.0),),
            "level with x0, the best other method (a difference of 0.0 ± 0.0 points), ahead on 0 of 3 seeds.",
        ),
        (((60.0,),), "10.0 points above x0, the best other method, ahead on the one seed that both have."),
        (((60.0, 61.0),), "10.5 ± 0.5 points above x0, the best other method, ahead on 2 of 2 seeds that both have."),
    ],
)
def test_ella_and_the_best_other_in_words(rivals, sentence):
    results = [*ELLA, *(r for i, finals in enumerate(rivals) for r in three_seeds(f"x{i}", finals))]
    assert comparisons(results)[0].sentence == f"By overall accuracy ELLA is {sentence}"
    assert f"ELLA is {sentence}" in " ".join(page(results).text) and f"ELLA is {sentence}" in render_text(results)


def test_no_rival_no_comparison():
    """ELLA under other settings is no other method, a reference no rival; without a common seed there is no pair."""
    variant = three_seeds("ella, strong", (99.0, 99.0, 99.0), arm="ella")
    reference = three_seeds("", (99.0, 99.0, 99.0), arm="joint")
    other_seed = [scored("late", 9, 50.0)]
    assert comparisons([*ELLA, *variant, *reference, *other_seed]) == [] == comparisons(variant + other_seed)
    found = comparisons([*ELLA, *variant, *reference, *three_seeds("x", (1.0, 2.0, 3.0))])
    assert [c.rival for c in found] == ["x", "x"]


def test_ella_with_a_penalty_of_its_own_is_compared_too():
    own = three_seeds("ELLA importance", (75.0, 76.0, 77.0), arm="ella")
    for run in own:
        run.config["settings"] = {"penalty": "importance"}
    results = [*ELLA, *own, *three_seeds("x", (71.0, 71.0, 71.0))]
    said = [found.sentence for found in comparisons(results)]
    assert said[0].startswith("By overall accuracy ELLA is 1.0 ± 1.2 points above x, the best other method")
    assert said[2] == (
        "By overall accuracy ELLA importance is 5.0 ± 0.6 points above x, the best other method, ahead on 3 of 3 seeds."
    )
    assert len(said) == 4 and all(line in " ".join(page(results).text) for line in said)


def test_backward_transfer_has_its_own_best_rival():
    results = [*ELLA, *three_seeds("sharp", (69.0,) * 3, bwt=-30.0), *three_seeds("calm", (40.0,) * 3, bwt=-2.0)]
    by_oa, by_bwt = comparisons(results)
    assert (by_oa.rival, by_bwt.rival) == ("sharp", "calm") and by_bwt.mean == pytest.approx(-8.0)
    assert by_bwt.sentence.startswith("By backward transfer ELLA is 8.0 ± 0.0 points below calm")


HEADLINE = "All methods, best overall accuracy first"


def test_methods_are_ordered_and_references_stand_below():
    results = [
        *three_seeds("worse", (50.0, 51.0, 52.0)),
        *three_seeds("", (90.0, 90.0, 90.0), arm="joint"),
        *ELLA,
        *three_seeds("", (80.0, 80.0, 80.0), arm="alone"),
        *three_seeds("better", (75.0, 75.0, 75.0)),
    ]
    assert ranked(summarise(results)) == (["better", "ella", "worse"], ["joint", "alone"])
    rows = table_of(render_markdown(results, **OPTIONS), HEADLINE)
    assert [row[0] for row in rows] == [
        "better",
        "ELLA",
        "worse",
        "*References: given what a stream does not give*",
        "joint training (earlier examples)",
        "an adapter per task (task ids)",
    ]
    # The best method is bold, not the better reference.
    assert rows[0][1] == "**75.0 ± 0.0** (75.0, 75.0, 75.0)" and rows[4][1] == "90.0 ± 0.0 (90.0, 90.0, 90.0)"
    shown = page(results)
    words = [t for t in shown.text if t.strip()]
    assert (
        words.index("better") < words.index("References: given what a stream does not give") < words.index("task ids")
    )
    text = render_text(results)
    assert text.index("\nbetter ") < text.index("\nworse ") < text.index("\njoint training (earlier examples) ")


def test_missing_seeds_and_unfinished_runs_are_said():
    unfinished = result("seqlora", 0)
    unfinished.matrix = AccuracyMatrix(NAMES, [[80.0, 30.0, NAN]])
    results = [result("ella", 0), result("ella", 1), result("inclora", 1), unfinished]
    summary = summarise(results)
    assert summary["seqlora"]["seeds"] == [] and math.isnan(summary["seqlora"]["mean"]["OA"])
    rows = {row[0]: row[1] for row in table_of(render_markdown(results, **OPTIONS), HEADLINE)}
    assert rows["IncLoRA (seed 1 only)"] == "**65.0**" and rows["SeqLoRA (not finished)"] == "–"
    assert list(rows)[-1].startswith("SeqLoRA")
    assert "nan" not in render_html(results, **OPTIONS).lower() and "nan" not in render_text(results)


def test_joint_training_has_scores_for_the_end_only():
    joint = result("joint")
    joint.matrix.rows = [[NAN] * 3, [NAN] * 3, [70.0, 80.0, 90.0]]
    for render in (render_html, render_markdown):
        text = render([joint, result("ella")], **OPTIONS)
        assert "nan" not in text.lower() and "80.0" in text
    rows = table_of(render_markdown([joint, result("ella")], **OPTIONS), HEADLINE)
    assert rows[-1] == ["joint training (earlier examples)", "80.0", "–"]


def test_markdown_and_json_have_the_same_numbers(tmp_path):
    results = [
        *ELLA,
        *three_seeds("x", (60.0, 61.5, 64.0), bwt=-20.0),
        *three_seeds("", (90.0, 91.0, 95.0), arm="joint"),
    ]
    json_path, _ = write_report(tmp_path, results, **OPTIONS)
    data = json.loads(json_path.read_text(encoding="utf-8"))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    rows = {row[0].split(" (")[0]: row[1:] for row in table_of(text, HEADLINE)}
    for values in data["arms"].values():
        for metric, cell in zip(("OA", "BWT"), rows[values["title"]], strict=False):
            numbers = [float(n) for n in re.findall(r"[+-]?\d+\.\d", cell)]
            expected = [values["mean"][metric], values["sd"][metric], *values["per_seed"][metric]]
            assert numbers == pytest.approx([round(v, 1) for v in expected], abs=0.051)
    for arm, values in data["arms"].items():
        matrix = table_of(text.replace("\\", ""), "IncLoRA" if arm == "inclora" else values["title"])
        for row, scores in zip(matrix, values["matrix"]["rows"], strict=True):
            cells = [float(c.strip("*")) if c else None for c in row[1:]]
            assert cells == pytest.approx(scores, abs=0.051)
    assert comparisons(results)[0].sentence in text.replace("\\", "")


# --- several orders ---------------------------------------------------------------------------------------------------


def orders_of_two() -> list[StreamResult]:
    results = []
    for order, shift in (("standard-1", 0.0), ("standard-2", 10.0), ("mine", -20.0)):
        results += three_seeds("", (70 + shift, 72 + shift, 74 + shift), arm="ella", order=order)
        results += three_seeds("olora", (60 + shift, 60 + shift, 60 + shift), order=order)
        results += three_seeds("", (80 + shift, 80 + shift, 80 + shift), arm="joint", order=order)
    return results + three_seeds("new", (99.0, 99.0, 99.0), order="mine")


def test_several_orders(tmp_path):
    results = orders_of_two()
    json_path, html_path = write_report(tmp_path, results, **OPTIONS)
    data = json.loads(json_path.read_text(encoding="utf-8"))
    assert "arms" not in data and list(data["orders"]) == ["standard-1", "standard-2", "mine"]
    assert data["orders"]["standard-2"]["arms"]["ella"]["mean"]["OA"] == pytest.approx(82.0)
    assert data["orders"]["mine"]["comparisons"][0]["rival"] == "new"
    over = data["over_orders"]
    assert over["arms"]["ella"]["mean"]["OA"] == pytest.approx((72 + 82 + 52) / 3)
    # An arm of one order only is no rival over all of them, and has no mean.
    assert over["arms"]["new"]["mean"]["OA"] is None and over["arms"]["new"]["orders"]["OA"]["mine"] == 99.0
    first = over["comparisons"][0]
    assert (first["rival"], first["mean"], first["wins"], first["pairs"]) == ("olora", pytest.approx(12.0), 9, 9)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.M) == ["All orders", "standard-1", "standard-2", "mine", "How it was run"]
    assert "ahead on 9 of 9 runs." in text
    rows = {row[0]: row[1:] for row in table_of(text, "Overall accuracy by order of the tasks")}
    assert rows["ELLA"] == ["**68.7**", "**72.0**", "**82.0**", "52.0"] and rows["new"] == ["–", "–", "–", "**99.0**"]
    shown = Page(html_path.read_text(encoding="utf-8"))
    assert shown.count("h3") == 9 and figures(shown, "average") == 3
    terminal = render_text(results)
    assert "mean over 3 orders" in terminal and "nan" not in terminal and "after x" not in terminal


def test_one_named_order_has_no_heading_of_its_own():
    text = render_markdown(three_seeds("", (70.0, 71.0, 72.0), arm="ella", order="mine"), **OPTIONS)
    assert "All orders" not in text and "mine" not in text.replace("mine the", "")


def test_published_numbers_stand_beside_ours_where_they_belong():
    text = render_markdown(orders_of_two(), **OPTIONS)
    assert text.count("Published overall accuracy") == 1
    rows = {row[0]: row[1:] for row in table_of(text, "Published overall accuracy, standard orders")}
    # Ours over the two orders of this family: the third is another.
    assert rows["ELLA"] == ["79.9", "77.0"] and rows["O-LoRA"] == ["75.8", "65.0"] and rows["GORP"] == ["79.8", "–"]
    assert rows["joint training"] == ["80.0", "85.0"] and "another model" in text
    single = [r for r in orders_of_two() if r.config["order"] == "standard-1"]
    assert "| ELLA | 79.9 | 72.0 |" in render_markdown(single, **OPTIONS)
    assert "Published" not in render_markdown(ELLA, **OPTIONS)
    long = render_markdown(three_seeds("", (60.0,), arm="ella", order="long-4"), **OPTIONS)
    assert table_of(long, "Published overall accuracy, long orders")[0] == ["GORP", "76.0", "–"]
