"""The pages: links that lead somewhere, a navigation with every page, and the site that is built of them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import maskwire

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *DOCS.glob("tutorials/*.md")])
GENERATOR = ("sphinx", "myst_parser", "pydata_sphinx_theme")


def without_code(page: Path) -> str:
    """A page's text without its code blocks, whose lines are neither links nor headings."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings; a second one of a name has -1, and so on."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", without_code(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        same = sum(1 for one in found if re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", one))
        found.add(f"{anchor}-{same}" if same else anchor)
    return found


def broken_links(page: Path) -> list[str]:
    """The relative links of a page whose file or heading does not exist."""
    text = re.sub(r"`[^`\n]*`", "", without_code(page))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)", text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def navigation() -> list[Path]:
    """The pages that docs/index.md lists, in order."""
    lists = re.findall(
        r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(), re.MULTILINE | re.DOTALL
    )
    lines = [line for block in lists for line in block.splitlines() if line and not line.startswith(":")]
    names = [re.sub(r"^.*<(.+)>$", r"\1", line) for line in lines]
    return [(DOCS / f"{name}.md").resolve() for name in names]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    assert broken_links(page) == []


def test_no_page_skips_a_level_of_headings() -> None:
    """The site's generator refuses such a page."""
    skips = {}
    for page in PAGES:
        levels = [0, *map(len, re.findall(r"^(#+) ", without_code(page), re.MULTILINE))]
        skips[page.name] = [below for above, below in pairwise(levels) if below > above + 1]
    assert {name: found for name, found in skips.items() if found} == {}


def test_a_link_to_a_missing_file_or_heading_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text(
        "# One `thing`: here\n\n```\n# no heading\n```\n\n## Same\n\n## Same\n"
    )
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n[a](other.md) [b](other.md#one-thing-here) [c](other.md#same-1) [d](#page) [e](https://example.org)\n"
        "[f](other.md#no-heading) [g](other.md#same-2) [h](gone.md) [i](#gone) `[j](in-code.md)`\n"
    )
    assert broken_links(page) == ["other.md#no-heading", "other.md#same-2", "gone.md", "#gone"]


def test_the_navigation_lists_every_page_once() -> None:
    listed = navigation()
    wanted = {*PAGES} - {DOCS / "index.md"}
    missing = sorted(str(page.relative_to(ROOT)) for page in wanted - {*listed})
    assert not missing, f"add a line for each to a list of docs/index.md: {missing}"
    assert sorted(listed) == sorted(wanted)


def test_the_readme_links_every_page_of_the_navigation() -> None:
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text())
    linked = {(ROOT / link).resolve() for link in links if not link.startswith("http")}
    missing = {*navigation()} - linked - {ROOT / "README.md"}
    assert not missing, f"add to the README's section Documentation: {sorted(page.name for page in missing)}"


def test_the_api_page_has_every_public_name_of_the_client() -> None:
    text = (DOCS / "api.md").read_text()
    headings = set(re.findall(r"^#+ `(.+)`$", text, re.MULTILINE))
    elsewhere = {"aio", "__version__", "MaskwireError"}
    assert {*maskwire.__all__} - elsewhere <= headings
    assert all(f"`maskwire.{name}" in text for name in elsewhere)
    for kind in (maskwire.Client, maskwire.Trainer):
        for name in dir(kind):
            if not name.startswith("_") and name != "target":
                assert re.search(rf"`((Client|Trainer)\.)?{name}`", text), name


def test_a_parameter_without_a_description_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    from api_reference import _function

    def described(rows: int, seed: int) -> None:
        """Do something.

        rows: How many.
        seed: The seed.
        """

    def lacking(rows: int, seed: int) -> None:
        """Do something.

        rows: How many.
        """

    def outdated(rows: int) -> None:
        """Do something.

        rows: How many.
        seed: No more.
        """

    assert "| `seed` | required | The seed. |" in _function("f", described)
    with pytest.raises(ValueError, match="f does not describe the argument 'seed'"):
        _function("f", lacking)
    with pytest.raises(ValueError, match=r"does not have: \{'seed'\}"):
        _function("f", outdated)


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in GENERATOR),
    reason="the site's generator is not installed (`make docs` installs it)",
)
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, str(DOCS / "website" / "build.py"), str(site)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = sorted(site.rglob("*.html"))
    assert {page.stem for page in pages} >= {page.stem for page in PAGES} | {"search"}
    assert 'url=docs/index.html"' in (site / "index.html").read_text()
    assert "takeov" in (site / "searchindex.js").read_text(), "the search's index is a file of the site"
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img)[^>]* (?:src|href)=\"([^\"]+)\"", page.read_text())
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], page.name
    kept = site / "index.html"
    again = subprocess.run(
        [sys.executable, str(DOCS / "website" / "build.py"), str(site)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 1
    assert f"{site} must be a new or an empty folder" in again.stderr
    assert kept.is_file()
