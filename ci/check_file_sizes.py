"""Refuses files that are too large for the history; called by pre-commit with the files to look at."""

from __future__ import annotations

import sys
from pathlib import Path

MAX_BYTES = 500_000


def main(paths: list[str]) -> int:
    sizes = {path: Path(path).stat().st_size for path in paths}
    too_large = {path: size for path, size in sizes.items() if size > MAX_BYTES}
    for path, size in too_large.items():
        fix = "make the data where it is used, or keep it outside the repo"
        print(f"{path}: expected at most {MAX_BYTES:,} bytes. Received: {size:,}. Fix: {fix}.")
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
