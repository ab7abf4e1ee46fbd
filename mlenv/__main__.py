"""``python -m mlenv``."""

import sys

from mlenv.cli import main

sys.exit(main())
