"""Build the documentation site into docs/_site, or into an empty folder that is named; a warning is an error.

docs/_site is replaced, so that no page of an earlier build stays.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from sphinx.cmd.build import main as build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main() -> int:
    """Entry point; exit status 1 after a warning."""
    if sys.argv[1:]:
        site = Path(sys.argv[1])
        if site.exists() and (not site.is_dir() or any(site.iterdir())):
            sys.exit(f"{site} must be a new or an empty folder, because the site is all that it will hold")
    else:
        site = ROOT / "docs" / "_site"
        shutil.rmtree(site, ignore_errors=True)
    # The parsed pages of an earlier build are not used: their warnings would not be repeated.
    with tempfile.TemporaryDirectory() as parsed:
        status = build(
            [
                "--fail-on-warning",
                "--keep-going",
                "--quiet",
                "-c",
                str(HERE),
                "-d",
                parsed,
                str(ROOT),
                str(site),
            ]
        )
    if status == 0:
        print(f"The site is in {site}; open {site / 'index.html'} in a browser.")
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
