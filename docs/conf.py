"""Configuration of the documentation: ``make docs``."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "_ext"), str(Path(__file__).parent.parent)]

import dropbp_fx  # noqa: E402

project = "dropbp_fx"
copyright = "the dropbp_fx authors"
release = version = dropbp_fx.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxarg.ext",
    "graph_atlas",
    "public_api",
]
exclude_patterns = ["_build", "_ext"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"dropbp_fx {release}"
html_static_path = ["_static"]
html_css_files = ["atlas.css"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_mock_imports: list[str] = []
napoleon_google_docstring = True
napoleon_use_ivar = True
nitpicky = False

# Sphinx turns logging on for every package; the atlas would list each branch it finds.
logging.getLogger("dropbp_fx").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module="transformers|torch")
