"""`python -m bunshin.cli` is the `bunshin` command."""

import sys

from . import main

sys.exit(main())
