"""The report: a page that stands alone, whatever the names and holes in the matrix, json and markdown that agree."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from bench.continual import REPORTS, section
from ella.config import EllaConfig
from ella.continual.environment import environment
from ella.continual.metrics import AccuracyMatrix
from ella.continual.report import (
    format_bytes,
    format_matrix,
    mean_matrix,
    render_html,
    render_markdown,
    summarise,
    write_report,
)
from ella.continual.report.charts import COLORS, OTHER_COLORS, looks
from ella.continual.report.summary import growth
from ella.continual.stream import StreamConfig, StreamResult

NAN = float("nan")
ENV = {"machine": "a machine", "system": "Linux x86_64", "python": "3", "versions": {"torch": "2"}, "command": "ella x"}
NAMES = ["first", "second", "third"]


def result(arm: str, seed: int = 0, shift: float = 0.0, names=NAMES, label="", order="", **matrix) -> StreamResult:
    rows = [[80.0 + shift, 30.0, NAN], [70.0, 90.0, 20.0], [50.0, 85.0, 60.0 + shift]]
    size = len(names)
    tasks = [
        {
            "name": name,
            "steps": 10,
            "seconds": 2.0,
            "penalty_seconds": 0.5 if arm == "ella" and i else 0.0,
            "loss": 0.1,
            "penalty": 0.0,
            "evaluation_seconds": 1.0,
        }
        for i, name in enumerate(names)
    ]
    return StreamResult(
        StreamConfig(arm=arm, seed=seed, label=label, order=order).to_dict(),
        AccuracyMatrix(list(names), [row[:size] for row in rows[:size]], **matrix),
        tasks,
        state_bytes=2048 if arm in ("inclora", "ella") else 0,
        dense_bytes=1 << 20,
        layers=12,
    )


class Page(HTMLParser):
    """Tags balanced; text, tags and attributes collected."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page(results, **options) -> Page:
    return Page(render_html(results, **{"title": "A run", "notes": {"data": "words"}, "env": ENV, **options}))


OPTIONS = {"title": "t", "notes": {}, "env": ENV}


def table_of(text: str, caption: str) -> list[list[str]]:
    """Cells of the markdown table under ``caption``, its two head lines left out."""
    block = text.partition(f"{caption}:\n\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]


def assert_self_contained(text: str) -> None:
    """No script, no address, nothing that a browser would fetch."""
    assert not re.search(r"<\s*(script|link|img|iframe|object|embed|base)\b", text, re.IGNORECASE)
    assert not re.search(r"(https?:)?//[a-z]|url\(|@import|\bsrc\s*=|\bhref\s*=", text, re.IGNORECASE)


ARMS = ("seqlora", "inclora", "ella")


def figures(page: Page, kind: str) -> int:
    return sum(tag == "figure" and attrs.get("class") == kind for tag, attrs in page.tags)


def test_a_page_with_all_arms():
    results = [result(arm, untrained=[10.0, 20.0, 30.0]) for arm in ARMS]
    text = render_html(results, title="A run", notes={"data": "words"}, env=ENV)
    assert_self_contained(text)
    shown = Page(text)
    # One forgetting curve for every task but the last and the average, with every arm in it.
    assert figures(shown, "forgetting") == 2 and figures(shown, "average") == 1
    lines = [attrs for tag, attrs in shown.tags if tag == "polyline"]
    assert len(lines) == 9 and all(attrs["points"] for attrs in lines)
    assert {attrs["stroke"] for attrs in lines} == {COLORS[arm] for arm in ARMS}
    words = " ".join(shown.text)
    for expected in ("65.0", "-17.5", "SeqLoRA", "IncLoRA", "ELLA", "a machine", "words"):
        assert expected in words, expected
    # Penalty's share over the tasks that had a past: 1.0 of 4.0 seconds, 50 ms of a step; sizes beside it.
    assert "25.0 %" in words and "50.0 ms" in words and "2.0 KiB" in words and "1.0 MiB" in words


def test_what_is_drawn_and_tabled_has_a_name():
    shown = page([result(arm, seed, order=order) for arm in ARMS for seed in (0, 1) for order in ("a", "b")])
    for tag, attrs in shown.tags:
        if tag == "svg":
            assert attrs.get("aria-hidden") == "true" or (attrs["role"] == "img" and len(attrs["aria-label"]) > 10)
        if tag == "th":
            assert attrs["scope"] in ("col", "row")
        if attrs.get("class") == "wide":
            # Not landmarks: those would have to be few, and each with a name of its own.
            assert attrs["role"] == "group" and attrs["aria-label"] and attrs["tabindex"] == "0"
    # Headings go down one level at a time.
    levels = [int(tag[1]) for tag, _ in shown.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_curves_stand_where_the_numbers_are():
    """x from the first to the last task, y downwards, over the twenties that the values need."""
    text = render_html([result("ella")], title="t", notes={}, env=ENV)
    average, first, second = re.findall(r'<polyline points="([^"]*)" fill="none" stroke="#1f6feb"', text)
    places = [[tuple(map(float, point.split(","))) for point in line.split()] for line in (average, first)]
    curves = (((80, 80, 65), 60, 80), ((80, 70, 50), 40, 100))  # 90 is in the other panel
    for points, (values, least, most) in zip(places, curves, strict=True):
        assert [x for x, _ in points] == [38.0, 183.0, 328.0]
        assert [round(y, 1) for _, y in points] == [round(12 + 162 * (most - v) / (most - least), 1) for v in values]
    assert len(second.split()) == 2


def test_many_tasks_are_many_small_panels():
    names = [f"task number {i}" for i in range(15)]
    results = [result(arm) for arm in ARMS]
    for r in results:
        r.matrix = AccuracyMatrix(names, [[90.0 - i] * 15 for i in range(15)])
    shown = page(results)
    assert figures(shown, "forgetting") == 14
    sizes = {
        attrs["width"] for tag, attrs in shown.tags if tag == "svg" and "accuracy on" in attrs.get("aria-label", "")
    }
    assert sizes == {"236"} and "15. task number 14" not in shown.text and "14. task number 13" in shown.text


def test_single_seeds_are_drawn_while_they_can_be_seen():
    few = [result("ella", label=f"arm {i}", seed=seed) for i in range(4) for seed in (0, 1)]
    many = few + [result("ella", seed=seed) for seed in (0, 1)]
    # Two panels of a mean and two seeds, the average of means only.
    assert page(few).count("polyline") == 4 * (2 * 3 + 1) and page(many).count("polyline") == 5 * (2 + 1)


def test_arms_look_different_on_both_papers():
    given = {arm: "" for arm in (*COLORS, *(f"ella, λ {i}" for i in range(8)))} | {"joint": "earlier examples"}
    found = looks(given)
    assert len({(look.color, look.dash) for look in found.values()}) == len(given) == 20
    assert len({found[arm].color for arm in COLORS}) == len(COLORS)

    def light(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    # 3 to 1 is what the web's guidelines ask of graphics.
    for color in (*COLORS.values(), *OTHER_COLORS):
        for paper in ("#ffffff", "#f6f8fa", "#0d1117", "#151b23"):
            bright, dark = sorted((light(color), light(paper)), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 3, (color, paper)


def test_cells_that_were_not_measured():
    results = [result("seqlora"), result("alone")]
    for r in results:
        r.matrix.rows = [[80.0, NAN, NAN], [NAN, 90.0, NAN], [NAN, NAN, 60.0]]
    text = render_html(results, title="t", notes={}, env=ENV)
    assert "nan" not in text.lower()
    shown = Page(text)
    assert "–" in shown.text


def test_only_the_reference_arm_and_only_one_task():
    assert figures(page([result("alone")]), "forgetting") == 0
    single = page([result(arm, names=["only"]) for arm in ARMS])
    # The headline, a matrix for every arm, the costs, how it was run.
    assert single.count("svg") == 0 and single.count("table") == 6


def test_names_are_escaped():
    evil = ['<script>alert("x")</script>', 'a & b\'s "quoted" </svg>', "third {body} | pipe"]
    results = [result(arm, names=evil) for arm in ARMS]
    results.append(result("inclora", names=evil, label='"><script>|*x*`'))
    results.append(result("inclora", names=evil, order="</h2><img>"))
    for r in results:
        r.tasks[1]["interference"] = {'<i onclick="x">.query': 1.0, "b.query": 2.0}
        r.tasks[1]["state_bytes"] = r.tasks[0]["state_bytes"] = r.tasks[2]["state_bytes"] = 5
    options = {"title": "<b>{style}</b>", "notes": {"<i>key": "<img src=x>\n| a"}}
    text = render_html(results, **options, env={**ENV, "command": "ella run '<u>'"})
    for found in ("<script", "<img", "<u>", "<b>{", "<i o"):
        assert found not in text, found
    shown = Page(text)
    assert figures(shown, "forgetting") == 4 and '<script>alert("x")</script>' in " ".join(shown.text)
    assert "<b>{style}</b>" in shown.text and "<img src=x>\n| a" in shown.text
    marked = render_markdown(results, **options, env={**ENV, "command": "ella run '<u>|`'"})
    assert not re.search(r"<(?!/?(details|summary)>)", marked)
    # No name makes a cell of its own: all rows of a table have the same number of bars.
    for block in marked.split("\n\n"):
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines() if line.startswith("|")}
        assert len(bars) <= 1, block


def test_seeds_are_averaged_and_listed():
    results = [result("ella", seed, shift) for seed, shift in ((0, 0.0), (1, 6.0))]
    summary = summarise(results)["ella"]
    assert summary["matrix"].rows[0][0] == 83.0 and summary["seeds"] == [0, 1]
    assert summary["mean"]["OA"] == pytest.approx(65 + 1) and summary["per_seed"]["OA"] == pytest.approx([65.0, 67.0])
    assert summary["mean"]["BWT"] == pytest.approx((-17.5 - 20.5) / 2)
    assert summary["seconds"] == pytest.approx(9.0) and summary["step_milliseconds"] == pytest.approx(200.0)
    assert summary["sd"]["OA"] == pytest.approx(math.sqrt(2))
    text = " ".join(page(results).text)
    assert "66.0 ± 1.4" in text and "(65.0, 67.0)" in text and "0, 1" in text


def test_a_mean_over_a_hole_is_a_hole():
    first, second = result("ella", 0), result("ella", 1)
    second.matrix.rows[0][1] = NAN
    mean = mean_matrix([first, second])
    assert mean.rows[0][1] != mean.rows[0][1] and mean.rows[1][1] == 90.0
    assert mean.untrained is None


def test_files_are_written_and_json_is_strict(tmp_path):
    results = [result(arm, seed) for seed in (0, 1) for arm in (*ARMS, "alone")]
    json_path, html_path = write_report(tmp_path / "out", results, title="t ü", notes={"a": "b"}, env=ENV)

    def refuse(constant):
        raise AssertionError(constant)

    data = json.loads(json_path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert data["title"] == "t ü" and data["notes"] == {"a": "b"} and data["environment"] == ENV
    assert list(data["arms"]) == [*ARMS, "alone"] and len(data["runs"]) == 8
    assert data["comparisons"][0]["rival"] == "seqlora" and data["comparisons"][0]["mean"] == 0.0
    assert data["arms"]["ella"]["mean"] == {"OA": 65.0, "BWT": -17.5, "FWT_zero_shot": None, "FWT_learning": None}
    assert data["arms"]["ella"]["matrix"]["rows"][0] == [80.0, 30.0, None]
    back = StreamResult.from_dict(data["runs"][2])
    assert back.arm == "ella" and back.matrix.overall_accuracy() == 65.0
    assert html_path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.md"]


# --- cost and interference --------------------------------------------------------------------------------------------


def test_bytes_against_the_number_of_tasks():
    results = [result(arm) for arm in ARMS]
    for r, sizes in zip(results, ((0, 0, 0), (1024, 2048, 3072), (2048, 2048, 2048)), strict=True):
        for task, size in zip(r.tasks, sizes, strict=True):
            task |= {"state_bytes": size, "peak_bytes": 5 << 20}
        r.state_bytes = sizes[-1]
    rows = {row[0]: row[1:] for row in table_of(render_markdown(results, **OPTIONS), "Time and memory")}
    assert rows["SeqLoRA"][3:] == ["5.0 MiB", "0 B", "nothing", "–"]
    assert rows["IncLoRA"][3:] == ["5.0 MiB", "1.0 KiB", "3.0 KiB growing", "1.0 MiB"]
    assert rows["ELLA"][2:6] == ["50.0 ms (25.0 %)", "5.0 MiB", "2.0 KiB", "2.0 KiB constant"]
    shown = page(results)
    assert figures(shown, "carried") == 1 and "3.0 KiB" in shown.text
    # Runs of before the sizes were recorded: what is known of them, and no chart.
    assert figures(page([result(arm) for arm in ARMS]), "carried") == 0


def test_how_bytes_grow():
    assert growth([]) == "" == growth([7]) and growth([0]) == "nothing"
    assert growth([0, 5, 5, 5]) == "constant from task 2 on" and growth([5, 9, 7]) == "varying"


def test_interference_is_shown_where_it_was_recorded():
    assert "Interference" not in render_markdown([result("ella")], **OPTIONS)
    first, second = result("ella", 0), result("ella", 1)
    for r, factor in ((first, 1.0), (second, 3.0)):
        for i in (1, 2):
            r.tasks[i]["interference"] = {f"m.layer.{n}.query": factor * i * 10.0**n for n in range(3)}
    text = render_markdown([first, second, result("seqlora")], **OPTIONS)
    rows = table_of(text, "ELLA: interference")
    assert rows == [["second", "222", "200 m.layer.2.query"], ["third", "444", "400 m.layer.2.query"]]
    shown = page([first, second, result("seqlora")])
    strengths = [float(attrs["fill-opacity"]) for tag, attrs in shown.tags if tag == "rect"]
    # Row by row; the smallest is still seen, the largest full.
    assert len(strengths) == 6 and strengths[0] == min(strengths) == 0.08 and strengths[-1] == max(strengths) == 1.0
    assert "2" in shown.text and "m.layer.1.query, second: 20" in shown.text


def test_settings_of_one_arm_are_said():
    r = result("ella", label="ella, strong")
    shared = EllaConfig(ella_lambda=0.5).to_dict()
    r.config |= {"settings": {"ella_lambda": 2.0, "past_rank": 128}, "ella": shared}
    text = " ".join(page([r]).text)
    # Only what is other than it would have been.
    assert "set for ella, strong ella_lambda 2.0 machine" in re.sub(r"\s+", " ", text)
    assert "set for" not in " ".join(page([result("ella")]).text)


def test_the_readme_reads_todays_reports(tmp_path):
    results = [result(arm, seed, seed * 6.0) for arm in ARMS for seed in (0, 1)]
    write_report(tmp_path / "continual_demo", results, **OPTIONS)
    orders = [result(arm, order=order) for order in ("standard-1", "standard-2") for arm in ("ella", "joint")]
    write_report(tmp_path / "continual_standard", orders, **OPTIONS)
    text = section(tmp_path)
    assert "| IncLoRA | 66.0 ± 1.4 / " in text and "The penalty takes 25.0 % of a training step" in text
    assert (
        "| method | standard-1 | standard-2 | seeds |" in text and "| joint training (given earlier examples) |" in text
    )
    assert text.count("Not measured yet") == len(REPORTS) - 2
    committed = section(Path(__file__).parents[2] / "bench" / "results")
    assert "| SeqLoRA |" in committed and "| ELLA |" in committed


def test_matrix_as_text():
    text = format_matrix(AccuracyMatrix(["a", "longer name"], [[50.0, NAN], [40.25, 100.0]], untrained=[1.0, 2.0]))
    assert text.splitlines() == [
        "                               a  longer name",
        "untrained                    1.0          2.0",
        "after a                     50.0            ·",
        "after longer name           40.2        100.0",
    ]


@pytest.mark.parametrize(
    "n, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (28 << 30, "28.0 GiB"),
        (1 << 41, "2048.0 GiB"),
    ],
)
def test_bytes(n, text):
    assert format_bytes(n) == text


def test_the_environment_says_machine_versions_and_command():
    env = environment(["ella", "run", "my file.yaml"])
    assert env["command"] == "ella run 'my file.yaml'"
    assert {"torch", "peft", "transformers"} <= env["versions"].keys()
    assert "threads" in env["machine"] and env["python"].startswith("3.")
