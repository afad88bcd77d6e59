"""python -m robustness: see `campaign`."""

from __future__ import annotations

import sys

from robustness.campaign import main

if __name__ == "__main__":
    sys.exit(main())
