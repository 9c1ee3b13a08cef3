"""Settings of Sphinx. The source folder is the repository, so that pages are read and linked where they are."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import attention_ext  # noqa: E402

project = "attention_ext"
author = "the attention_ext authors"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx's name
release = attention_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**", "examples/README.md"]
exclude_patterns = ["docs/templates"]
templates_path = ["templates"]
default_role = "code"
smartquotes = False

autodoc_mock_imports = [
    "matplotlib",
    "onnxscript",
    "opacus",
    "peft",
    "transformers",
]  # the page of each integration is built without its library

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "pydata_sphinx_theme"
html_title = f"{project} {release}"
html_show_sourcelink = False
html_additional_pages = {"index": "to_contents.html"}  # the contents are in docs/index.html
html_theme_options = {"show_prev_next": False, "navigation_with_keys": False}
