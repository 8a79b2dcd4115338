"""The examples of README.md run."""

from __future__ import annotations

import linecache
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Examples")[2].partition("\n## ")[0]
EXAMPLES = re.findall(r"^\*\*([\w ]+).*?^```python\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)


def test_every_example_is_found() -> None:
    assert len(EXAMPLES) == README.count("```python") == 6


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example(title: str, code: str) -> None:
    if "import torch" in code and find_spec("torch") is None:
        pytest.skip("torch is not installed")
    name = f"README.md, {title}"
    linecache.cache[name] = len(code), None, code.splitlines(keepends=True), name  # as notebooks do
    exec(compile(code, name, "exec"), {})
