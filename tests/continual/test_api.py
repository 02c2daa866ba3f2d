"""The names of ella.continual, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ella.continual


def test_every_name_is_there():
    for name in ella.continual.__all__:
        assert getattr(ella.continual, name).__name__ == name
    assert set(ella.continual.__all__) <= set(dir(ella.continual))
    with pytest.raises(AttributeError, match=r"'ella\.continual' has no attribute 'ewc'"):
        ella.continual.ewc  # noqa: B018


def test_reading_tasks_imports_no_model_library():
    code = (
        "import sys, ella.continual; from ella.continual import Task, docstring_tasks;"
        "heavy = {'transformers', 'peft', 'datasets', 'yaml'} & set(sys.modules); assert not heavy, heavy"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
