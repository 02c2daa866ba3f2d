"""The annotations reach who installs the packages."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_markers_are_shipped(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert sorted(path.parent.name for path in tmp_path.rglob("py.typed")) == ["ella", "ella_kernels"]
    assert (tmp_path / "ella" / "continual" / "stream.py").exists()
