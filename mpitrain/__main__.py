"""``python -m mpitrain`` is the ``mpitrain`` command."""

import sys

from mpitrain.cli.main import main

sys.exit(main())
