"""`python -m scalebits_compiler`: the same as `scalebitsc`."""

import sys

from scalebits_compiler.cli.main import main

sys.exit(main())
