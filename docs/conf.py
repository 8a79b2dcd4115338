"""The documentation site: `python -m sphinx -W docs build/docs`. Building it fetches nothing."""

import os
import subprocess
import sys
from pathlib import Path

import fastll

project = "fastll"
author = project_copyright = "The fastll developers"
version = release = fastll.__version__

extensions = [
    "myst_parser",  # includes parts of README.md and CHANGELOG.md
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
source_suffix = {".rst": "restructuredtext"}
html_theme = "furo"
html_title = f"fastll {release}"

suppress_warnings = ["myst.header"]  # what is included begins with a second-level header

default_role = "py:obj"  # a link where there is such a function, and otherwise plain code
add_module_names = False
autodoc_typehints = "none"  # the docstrings say more
napoleon_google_docstring = False
napoleon_use_rtype = False


def run_examples(app):
    """Run every example as a program, which draws its plot; one that fails stops the build."""
    plots = Path(__file__).parent / "_plots"
    plots.mkdir(exist_ok=True)
    for example in sorted(Path(__file__).parents[1].glob("examples/*.py")):
        command = [sys.executable, str(example), str(plots / f"{example.stem}.svg")]
        subprocess.run(command, env=os.environ | {"MPLBACKEND": "agg"}, check=True)


def setup(app):
    app.connect("builder-inited", run_examples)
