"""`python -m rlft` is `rlft`."""

import sys

from rlft.cli.main import main

sys.exit(main())
