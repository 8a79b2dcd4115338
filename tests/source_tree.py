"""A source tree whose extension is not compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def make_tree(folder: Path) -> Path:
    """Copy the packages and setup.py to a folder, without anything compiled."""
    for name in ("fastll", "bench"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "results"),
        )
    shutil.copy(ROOT / "setup.py", folder)
    return folder


def run_in(tree: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m`` in a source tree, which Python then imports from."""
    # nor the name of a worker of pytest-xdist, where pytest-benchmark measures nothing
    left_out = ("PYTHONPATH", "PYTEST_XDIST_WORKER")
    variables = {name: value for name, value in os.environ.items() if name not in left_out}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=tree,
        env=variables | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
