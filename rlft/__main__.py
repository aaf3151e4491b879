"""`python -m rlft` is `rlft`."""

import sys

from rlft.cli import main

sys.exit(main())
