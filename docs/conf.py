"""The documentation's site: ``make docs`` writes it to build/docs, and any warning is an error.

Sphinx reads the guides (Markdown, by myst-parser). It takes docstrings and signatures from the
imported package.
"""

from __future__ import annotations

from pathlib import Path

import tomllib

from tokenflow_ext import models  # noqa: F401  (before autodoc imports a part of it)

_PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

project = _PROJECT["name"]
version = release = _PROJECT["version"]
author = f"The {project} authors"
project_copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["build"]
html_theme = "furo"
html_title = f"{project} {version}"
html_copy_source = False

# Guides.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # GitHub's anchors, so that a link works in both places

# Docstrings: sections as Google has them, and `name` is code.
default_role = "literal"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
