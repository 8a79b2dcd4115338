"""The pages of the documentation are complete. Their doctests run too: pytest collects docs/*.rst."""

import re
from pathlib import Path

import pytest

import fastll
import fastll.formulas

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.rst")}
OBJECT = re.compile(r"^\.\. auto(?:function|class|module):: fastll\.(\w+)$", re.MULTILINE)


def test_every_public_name_is_on_one_page():
    documented = [name for text in PAGES.values() for name in OBJECT.findall(text)]
    assert sorted(documented) == sorted(fastll.__all__)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if OBJECT.search(text)])
def test_a_page_of_functions_has_an_example_that_runs(page):
    assert re.search("^>>> ", PAGES[page], re.MULTILINE)


def test_every_example_is_shown():
    included = re.compile(r"^\.\. literalinclude:: \.\./(examples/\w+\.py)$", re.MULTILINE)
    shown = included.findall(PAGES["examples"])
    assert sorted(shown) == sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py"))


def test_every_operation_of_a_formula_is_listed():
    assert [name for name in fastll.formulas.__all__ if f"``{name}(" not in PAGES["own"]] == []
