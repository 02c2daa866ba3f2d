"""Where and with what a number was measured."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["environment", "source_commit"]


def environment(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Machine, versions, commit and command: what a number needs beside it."""
    import torch

    versions = {}
    for package in ("ella-kernels", "torch", "triton", "peft", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else _processor()
    return {
        "machine": f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": source_commit(),
        "command": shlex.join(command if command is not None else [_program(), *sys.argv[1:]]),
    }


def _program() -> str:
    path = Path(sys.argv[0])
    # python -m PACKAGE
    return path.parent.name if path.name == "__main__.py" else path.name


@cache
def source_commit() -> str | None:
    """Of the source checkout that this code is run from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
