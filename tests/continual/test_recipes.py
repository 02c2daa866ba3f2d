"""The committed stream files can be read, and every arm in them can be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from ella.continual.arms import ARMS
from ella.continual.spec import load_spec

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes" / "continual").glob("*.yaml"))


def test_there_are_some():
    assert {path.stem for path in RECIPES} == {
        "standard", "standard-constant", "long", "methods", "t5-large", "llama-3.1-8b",
    }  # fmt: skip


def test_the_recipe_of_all_methods_has_all():
    (path,) = [path for path in RECIPES if path.stem == "methods"]
    assert {arm.arm for arm in load_spec(path).arms} == set(ARMS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_stream_file_is_whole(path):
    spec = load_spec(path)
    assert path.read_text(encoding="utf-8").startswith(f"# ella run recipes/continual/{path.name} --data CL_Benchmark")
    names = [arm.name for arm in spec.arms]
    assert "ella" in names and "inclora" in names and len(set(names)) == len(names)
    assert all(arm.ella.ella_lambda == "auto" for arm in spec.arms)
