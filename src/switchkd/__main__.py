"""`python -m switchkd` is the command `switchkd`."""

import sys

from switchkd.cli import main

sys.exit(main())
