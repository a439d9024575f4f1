"""python -m glmimg is the command glmimg."""

from __future__ import annotations

import sys

from glmimg.cli import main

if __name__ == "__main__":
    sys.exit(main())
