"""The page in a browser: what the first screen says, and what a narrow, a printed and a colour-blind view need."""

from __future__ import annotations

import re
from itertools import pairwise

from ella.continual.report import render_html, render_markdown
from ella.continual.report.charts import COLORS, line_chart, looks
from ella.continual.report.page import _STYLE
from ella.continual.stream import StreamResult

from .test_report import ARMS, OPTIONS, Page, page, result, table_of


def carrying(arm: str, sizes=(1024, 2048, 3072), **options) -> StreamResult:
    r = result(arm, **options)
    for task, size in zip(r.tasks, sizes, strict=True):
        task["state_bytes"] = size
    r.state_bytes = sizes[-1]
    return r


def before_the_numbers(results) -> str:
    return render_markdown(results, **OPTIONS).partition("| ")[0]


# --- the first screen -------------------------------------------------------------------------------------------------


def test_costs_and_meanings_stand_before_the_numbers():
    costs = "its penalty takes 25.0 % of a 200 ms step; after the last task it carries 3.0 KiB (growing)."
    first = before_the_numbers([carrying("ella"), result("seqlora")])
    assert f"**What ELLA costs: {costs}**" in first and "the further below zero, the more is forgotten" in first
    text = render_markdown([carrying(arm, order=order) for order in "ab" for arm in ("seqlora", "ella")], **OPTIONS)
    # Of one of the orders, and then not again under each.
    assert f"**What ELLA costs on a: {costs}**" in text.partition("| ")[0]
    assert text.count("What ELLA costs") == 1 == text.count("Backward transfer is")


def test_costs_that_are_not_known_are_not_said():
    assert "costs" not in before_the_numbers([result("seqlora")])
    r = result("ella")
    for task in r.tasks:
        task["penalty_seconds"] = 0.0
    assert "What ELLA costs: after the last task it carries 2.0 KiB.**" in before_the_numbers([r])
    r.state_bytes = 0
    assert "costs" not in before_the_numbers([r])


# --- tables -----------------------------------------------------------------------------------------------------------


def test_only_long_names_of_columns_break():
    names = ["SST-2", "a task with a longer name", "third"]
    heads = re.findall(
        r'<th scope="col"( class="long")?>([^<]*)</th>', render_html([result("ella", names=names)], **OPTIONS)
    )
    long = {name for mark, name in heads if mark}
    assert {"a task with a longer name", "overall accuracy"} <= long
    assert {"SST-2", "third", "one run"} <= {name for _, name in heads} - long


def test_references_are_a_group_of_rows():
    text = render_html([result("ella"), result("joint")], **OPTIONS)
    groups = re.findall(r'<tbody><tr class="divider"><th colspan="3" scope="rowgroup">References', text)
    assert len(groups) == 1 and text.count("<tbody>") == text.count("</tbody>") == text.count("<table") + 1


def test_interference_is_folded_and_names_no_layer_without_a_past():
    r = result("ella")
    for i, task in enumerate(r.tasks):
        task["interference"] = {"m.0.query": 0.5 * i, "m.1.query": 2.0 * i}
    text = render_markdown([r], **OPTIONS)
    assert text.index("interference as a table</summary>") < text.index("ELLA: interference:")
    assert table_of(text, "ELLA: interference")[:2] == [["first", "0", "0"], ["second", "2.5", "2 m.1.query"]]
    # What moves sideways is reached with the keyboard.
    strips = [attrs for tag, attrs in page([r]).tags if tag == "figure" and attrs.get("class") == "strip"]
    assert [attrs["tabindex"] for attrs in strips] == ["0"]


# --- charts -----------------------------------------------------------------------------------------------------------


def test_only_the_first_line_is_full_and_only_references_are_dotted():
    given = {arm: "task ids" if arm in ("alone", "joint", "replay") else "" for arm in (*reversed(COLORS), "mine")}
    found = looks(given)
    assert [arm for arm, look in found.items() if not look.dash] == ["ella"]
    dotted = {arm for arm, look in found.items() if look.dash == found["joint"].dash}
    assert dotted == {"alone", "joint", "replay"} and len({look.dash for look in found.values()}) == 5
    assert not looks({"mine": ""})["mine"].dash


def test_the_line_of_ella_lies_under_the_others():
    text = render_html([result(arm) for arm in ARMS], **OPTIONS)
    average = text.partition('class="average"')[2].partition("</figure>")[0]
    drawn = re.findall(r'<polyline [^>]*stroke="([^"]*)"', average)
    assert len(drawn) == 3 and drawn[0] == COLORS["ella"]
    # Its points show around those of the others.
    radii = {color: float(r) for r, color in re.findall(r'r="([^"]*)" fill="([^"]*)"', average)}
    assert radii[COLORS["ella"]] > radii[COLORS["inclora"]]


def texts(svg: str) -> list[tuple[float, float, str, str]]:
    """x, y, anchor and words."""
    found = re.findall(r'<text x="([^"]*)" y="([^"]*)" text-anchor="([^"]*)">([^<]*)<', svg)
    return [(float(x), float(y), anchor, words) for x, y, anchor, words in found]


def test_numbers_of_tasks_stand_under_their_points():
    chart = line_chart("c", [], [str(i + 1) for i in range(15)], what="w", kind="average").html
    shown = texts(chart)[5:]
    assert [words for *_, words in shown] == [str(i + 1) for i in range(15)]
    steps = {round(right[0] - left[0], 1) for left, right in pairwise(shown)}
    assert {anchor for _, _, anchor, _ in shown} == {"middle"} and max(steps) - min(steps) <= 0.11
    # Two digits of 11 px are 14 px wide.
    assert min(steps) > 15


def test_labels_of_bytes_are_inside_the_chart():
    text = render_html([carrying("ella", (1 << 20, 2 << 20, 4000 << 10))], **OPTIONS)
    sizes = texts(text.partition('class="carried"')[2].partition("</figure>")[0])[:5]
    assert [words for *_, words in sizes] == ["0 B", "1000.0 KiB", "2.0 MiB", "2.9 MiB", "3.9 MiB"]
    # 6.6 px for a letter of 11 px is wide.
    assert all(x - 6.6 * len(words) >= 0 for x, _, anchor, words in sizes if anchor == "end")


def test_charts_stand_three_in_a_row():
    widths = [int(a["width"]) for tag, a in page([result("ella")]).tags if tag == "svg" and a.get("role") == "img"]
    room = int(re.search(r"max-width:(\d+)px;\s*margin:0 auto; padding:32px 20px", _STYLE)[1]) - 2 * 20
    card = 2 * (int(re.search(r"figure \{[^}]*padding:(\d+)px", _STYLE)[1]) + 1)
    assert widths and 3 * (max(widths) + card) + 2 * 16 <= room < 1280


# --- style ------------------------------------------------------------------------------------------------------------


def test_a_printed_page_lacks_nothing():
    """What is folded, what scrolls, and what has its meaning from a background; dark ink is for screens."""
    printed = _STYLE.partition("@media print")[2]
    for rule in ("details::details-content { content-visibility:visible", ".wide,.strip { overflow:visible }"):
        assert rule in printed, rule
    assert "print-color-adjust:exact" in printed and "screen and (prefers-color-scheme: dark)" in _STYLE


def test_every_class_has_its_style():
    results = [carrying(arm, untrained=[1.0, 2.0, 3.0]) for arm in (*ARMS, "joint")]
    used = {
        name for _, attrs in Page(render_html(results, **OPTIONS)).tags for name in (attrs.get("class") or "").split()
    }
    # Names of figures and of grid lines, for tests and for who styles the page anew.
    assert {name for name in used if f".{name}" not in _STYLE} <= {"average", "forgetting", "carried", "grid"}


def test_panels_share_the_axis_that_they_need():
    """Values between 50 and 90: from 40 to 100 in all panels, and the highest below the top line."""
    text = render_html([result(arm) for arm in ARMS], **OPTIONS)
    panels = [part.partition("</figure>")[0] for part in text.split('class="forgetting"')[1:]]
    assert [words for *_, words in texts(panels[0])[:5]] == ["40", "55", "70", "85", "100"]
    assert len(panels) == 2 and texts(panels[1])[:5] == texts(panels[0])[:5]
    lines = {float(y) for y in re.findall(r'class="grid"[^>]* y1="([^"]*)"', panels[0])}
    points = [float(y) for panel in panels for y in re.findall(r'cy="([^"]*)"', panel)]
    assert min(lines) < min(points) < max(points) < max(lines)
