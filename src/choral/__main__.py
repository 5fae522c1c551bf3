"""``python -m choral`` is the command ``choral``."""

import sys

from choral.cli.command_line import main

sys.exit(main())
