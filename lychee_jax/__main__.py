"""`python -m lychee_jax` is the `lychee` command."""

import sys

from lychee_jax.cli.main import main

sys.exit(main())
