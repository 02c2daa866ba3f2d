"""The report: a page that stands alone, whatever the names and holes in the matrix, and json that parses."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from ella.continual.metrics import AccuracyMatrix
from ella.continual.report import (
    environment,
    format_bytes,
    format_matrix,
    mean_matrix,
    render_html,
    summarise,
    write_report,
)
from ella.continual.stream import StreamConfig, StreamResult

NAN = float("nan")
ENV = {"machine": "a machine", "system": "Linux x86_64", "python": "3", "versions": {"torch": "2"}, "command": "ella x"}
NAMES = ["first", "second", "third"]


def result(arm: str, seed: int = 0, shift: float = 0.0, names=NAMES, **matrix) -> StreamResult:
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
        StreamConfig(arm=arm, seed=seed).to_dict(),
        AccuracyMatrix(list(names), [row[:size] for row in rows[:size]], **matrix),
        tasks,
        state_bytes=2048 if arm in ("inclora", "ella") else 0,
        dense_bytes=1 << 20,
        layers=12,
    )


class Page(HTMLParser):
    """Tags balanced; text, tags and attributes collected."""

    VOID = ("meta", "line", "polyline")

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


def assert_self_contained(text: str) -> None:
    """No script, no address, nothing that a browser would fetch."""
    assert not re.search(r"<\s*(script|link|img|iframe|object|embed|base)\b", text, re.IGNORECASE)
    assert not re.search(r"(https?:)?//[a-z]|url\(|@import|\bsrc\s*=|\bhref\s*=", text, re.IGNORECASE)


ARMS = ("seqlora", "inclora", "ella")


def test_a_page_with_all_arms():
    results = [result(arm, untrained=[10.0, 20.0, 30.0]) for arm in ARMS]
    text = render_html(results, title="A run", notes={"data": "words"}, env=ENV)
    assert_self_contained(text)
    shown = Page(text)
    # One forgetting curve for every task but the last, with every arm in it.
    assert shown.count("svg") == 2
    lines = [attrs for tag, attrs in shown.tags if tag == "polyline"]
    assert len(lines) == 6 and all(attrs["points"] for attrs in lines)
    assert {attrs["stroke"] for attrs in lines} == {"#b4552d", "#8a8f98", "#1f6feb"}
    words = " ".join(shown.text)
    for expected in ("65.0", "-17.5", "SeqLoRA", "IncLoRA", "ELLA", "a machine", "words"):
        assert expected in words, expected
    # Penalty's share over the tasks that had a past: 1.0 of 4.0 seconds; sizes beside it.
    assert "25.0 %" in words and "2.0 KiB" in words and "1.0 MiB" in words


def test_curves_stand_where_the_numbers_are():
    """x from the first to the last task, y from 0 to 100 downwards."""
    text = render_html([result("ella")], title="t", notes={}, env=ENV)
    first, second = re.findall(r'<polyline points="([^"]*)" stroke="#1f6feb" stroke-width="2.5"', text)
    points = [tuple(map(float, point.split(","))) for point in first.split()]
    assert [x for x, _ in points] == [38.0, 183.0, 328.0]
    assert [round(y, 1) for _, y in points] == [round(12 + 162 * (1 - v / 100), 1) for v in (80, 70, 50)]
    assert len(second.split()) == 2


def test_cells_that_were_not_measured():
    results = [result("seqlora"), result("alone")]
    for r in results:
        r.matrix.rows = [[80.0, NAN, NAN], [NAN, 90.0, NAN], [NAN, NAN, 60.0]]
    text = render_html(results, title="t", notes={}, env=ENV)
    assert "nan" not in text.lower()
    shown = Page(text)
    assert "–" in shown.text


def test_only_the_reference_arm_and_only_one_task():
    assert page([result("alone")]).count("svg") == 0
    single = page([result(arm, names=["only"]) for arm in ARMS])
    assert single.count("svg") == 0 and single.count("table") == 6


def test_names_are_escaped():
    evil = ['<script>alert("x")</script>', 'a & b\'s "quoted" </svg>', "third {body}"]
    text = render_html(
        [result(arm, names=evil) for arm in ARMS],
        title="<b>{style}</b>",
        notes={"<i>key": "<img src=x>"},
        env={**ENV, "command": "ella run '<u>'"},
    )
    assert "<script" not in text and "<img" not in text and "<u>" not in text and "<b>{" not in text
    shown = Page(text)
    assert shown.count("svg") == 2 and '<script>alert("x")</script>' in shown.text
    assert "<b>{style}</b>" in shown.text and "<img src=x>" in shown.text


def test_seeds_are_averaged_and_listed():
    results = [result("ella", seed, shift) for seed, shift in ((0, 0.0), (1, 6.0))]
    summary = summarise(results)["ella"]
    assert summary["matrix"].rows[0][0] == 83.0 and summary["seeds"] == [0, 1]
    assert summary["mean"]["OA"] == pytest.approx(65 + 1) and summary["per_seed"]["OA"] == pytest.approx([65.0, 67.0])
    assert summary["mean"]["BWT"] == pytest.approx((-17.5 - 20.5) / 2)
    assert summary["seconds"] == pytest.approx(9.0) and summary["step_milliseconds"] == pytest.approx(200.0)
    text = " ".join(page(results).text)
    assert "(65.0, 67.0)" in text and "0, 1" in text


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
    assert data["arms"]["ella"]["mean"] == {"OA": 65.0, "BWT": -17.5, "FWT_zero_shot": None, "FWT_learning": None}
    assert data["arms"]["ella"]["matrix"]["rows"][0] == [80.0, 30.0, None]
    back = StreamResult.from_dict(data["runs"][2])
    assert back.arm == "ella" and back.matrix.overall_accuracy() == 65.0
    assert html_path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]


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
