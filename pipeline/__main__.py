"""``python -m pipeline`` is ``coda``."""

import sys

from pipeline.cli import main

sys.exit(main())
