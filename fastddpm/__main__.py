"""``python -m fastddpm`` is the command ``fastddpm``."""

import sys

from .cli import main

sys.exit(main())
