"""``python -m dropbp_fx`` is the command line."""

import sys

from dropbp_fx.inspect.cli import main

sys.exit(main())
