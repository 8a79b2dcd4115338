"""The documentation site: `python -m sphinx -W docs build/docs`. Building it fetches nothing."""

import fastll

project = "fastll"
author = project_copyright = "The fastll developers"
version = release = fastll.__version__

extensions = [
    "matplotlib.sphinxext.plot_directive",  # runs the examples and draws their plots
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

plot_formats = [("svg", 72)]
plot_html_show_formats = False
plot_html_show_source_link = False
plot_include_source = True
