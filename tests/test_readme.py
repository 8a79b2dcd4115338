"""The examples of README.md run."""

from __future__ import annotations

import linecache
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTIONS = [
    README.partition(f"## {name}")[2].partition("\n## ")[0] for name in ("Examples", "Other frameworks")
]
EXAMPLES = re.findall(
    r"^\*\*([\w ]+).*?^```python\n(.*?)^```", "".join(SECTIONS), re.DOTALL | re.MULTILINE
)


def test_every_example_is_found() -> None:
    assert len(EXAMPLES) == README.count("```python") >= 6


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example(title: str, code: str) -> None:
    for package in re.findall(r"^(?:import|from) (?:fastll\.interop\.)?(\w+)", code, re.MULTILINE):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    name = f"README.md, {title}"
    linecache.cache[name] = len(code), None, code.splitlines(keepends=True), name  # as notebooks do
    exec(compile(code, name, "exec"), {})
