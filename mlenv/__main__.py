"""``python -m mlenv``."""

from __future__ import annotations

import sys

from mlenv.cli import main

sys.exit(main())
