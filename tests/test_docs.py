"""The pages in docs/ say what the code says: names, links and worked examples."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench" / "NOTES.md"])
# Names that stand for a file or function to come.
PLACEHOLDERS = re.compile(r"[<*]")


def source(folder):
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).glob("*.py")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    words = re.findall(r"`([a-z_]+(?:/[A-Za-z_*<>.]+)+\.(?:py|md|json|yaml))`", page.read_text(encoding="utf-8"))
    names = [name for name in words if not PLACEHOLDERS.search(name)]
    places = (ROOT, ROOT / "ella_kernels")
    assert [name for name in names if not any((place / name).exists() for place in places)] == []


def test_examples_of_the_mathematics_hold():
    failed, attempted = doctest.testfile(str(ROOT / "docs" / "math.md"), module_relative=False)
    assert attempted > 5 and failed == 0


def test_the_letters_are_those_of_the_code():
    text = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| `\S+`(, `\S+`)? \|", line)]
    assert len(rows) > 10
    in_torch, in_triton = source("ella_kernels/torch_backend"), source("ella_kernels/triton_backend")
    for letter, _, _, torch_names, triton_names in rows:
        for names, code in ((torch_names, in_torch), (triton_names, in_triton)):
            for name in re.findall(r"`(\w+)`", names):
                assert name == "s" or re.search(rf"\b{name}\b", code), f"{letter.strip()}: no {name} in the code"


def test_no_letter_stands_for_two_things():
    text = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    letters = [name for line in text.splitlines() if (row := re.match(r"\| (`\S+`(?:, `\S+`)?) \|", line))
               for name in re.findall(r"`(\S+?)`", row[1])]  # fmt: skip
    assert len(letters) == len(set(letters)) > 15


def test_the_page_for_extensions_names_what_there_is():
    continual = ("ella/continual", "ella/continual/arms", "ella/continual/report")
    folders = ("ella", *continual, "ella_kernels", "ella_kernels/torch_backend", "ella_kernels/triton_backend")
    code = "".join(map(source, folders)) + source("tests/kernels") + source("tests/ella") + source("bench")
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    names = {name.rpartition(".")[2] for name in re.findall(r"`(_?[A-Za-z_.]*[A-Z_][A-Za-z_]*)`", text)}
    assert len(names) > 25
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", code)) == []
    tests = re.findall(r"`(test_\w+\.py)`", text)
    assert len(tests) > 15 and [name for name in tests if not list((ROOT / "tests").rglob(name))] == []
