"""Sphinx's configuration of the documentation site; `make docs` builds it.

The sources are the pages as GitHub shows them: the root is the repository, so that their relative links hold.
docs/index.md is the front page and has the navigation.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "client"))

from maskwire import __version__  # noqa: E402

project = "maskwire"
version = release = __version__
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/tutorials/*.md"]
# Folders that Sphinx need not search.
exclude_patterns = [
    ".*",
    "client",
    "demo",
    "deploy",
    "examples",
    "proto",
    "runs",
    "server",
    "tests",
    "docs/_site",
]

extensions = ["myst_parser"]
myst_heading_anchors = 4  # the anchors that GitHub makes
nitpicky = True
smartquotes = False  # it would turn the -- of options into a dash
highlight_language = "text"  # a block without a language is a command line, or output

html_theme = "pydata_sphinx_theme"
html_title = "maskwire"
html_static_path = ["static"]
html_css_files = ["site.css"]
templates_path = ["templates"]
html_copy_source = False
html_sidebars = {"**": ["navigation"]}
html_theme_options: dict[str, Any] = {
    "logo": {"text": f"maskwire {release}"},
    "navbar_center": [],
    "navbar_persistent": ["search-button-field"],
    "navbar_end": ["theme-switcher"],
    "navigation_with_keys": False,
    "show_nav_level": 1,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": [],
    "footer_end": [],
    "article_footer_items": ["prev-next"],
}


def name_folders(app: Any, document: nodes.document) -> None:
    """A link to a folder of the repository becomes its text: the site has files, but no folders."""
    page = Path(app.env.doc2path(app.env.docname))
    for link in list(document.findall(addnodes.pending_xref)):
        if link["reftype"] == "myst" and (page.parent / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def write_entrance(app: Any, error: Exception | None) -> None:
    """Write the index.html of the site's folder, which leads to the front page."""
    if error is None:
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><title>{project}</title>\n'
        Path(app.outdir, "index.html").write_text(page)


def setup(app: Any) -> None:
    """Connect the functions above to Sphinx's events."""
    app.connect("doctree-read", name_folders)
    app.connect("build-finished", write_entrance)
