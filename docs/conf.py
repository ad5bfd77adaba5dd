"""Sphinx configuration: ``make docs``."""

import importlib.metadata

project = "kgraph"
author = "the kgraph authors"
try:
    release = importlib.metadata.version("kgraph")
except importlib.metadata.PackageNotFoundError:  # built from a tree that is not installed
    release = ""

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # Args: and Raises: sections
    "sphinx.ext.mathjax",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # the signatures of the source are in the text already
autodoc_member_order = "bysource"
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "kgraph"
