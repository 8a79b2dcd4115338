"""The examples run, and what they assert holds."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example(path, tmp_path):
    if "sklearn" in path.read_text(encoding="utf-8") and find_spec("sklearn") is None:
        pytest.skip("scikit-learn is not installed")
    plot = tmp_path / "plot.png"
    # one thread for matrix products: those that wait spin, and tests have all cores busy
    environment = os.environ | {
        "MPLBACKEND": "agg",
        "PYTHONPATH": str(ROOT),
        "OPENBLAS_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-W", "error", path, plot], env=environment, check=True)
    assert plot.stat().st_size > 0
