"""Settings of Sphinx: `make docs` writes the pages and the API, from the docstrings, as HTML."""

from mdeq_mm.version import __version__

project = 'mdeq_mm'
author = 'The mdeq_mm contributors'
release = version = __version__
extensions = ['sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'myst_parser']
exclude_patterns = ['images', 'studies', 'html']
source_suffix = {'.md': 'markdown', '.rst': 'restructuredtext'}
master_doc = 'index'
html_theme = 'alabaster'
html_static_path = []
# Links to headings, as GitHub makes them.
myst_heading_anchors = 4
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
# The README and what it links to lie outside of this folder.
suppress_warnings = ['myst.header']
