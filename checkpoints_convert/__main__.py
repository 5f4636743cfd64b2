"""`python -m checkpoints_convert SRC DST …` is the `lychee convert` command."""

import sys

from lychee_jax.cli.main import main

sys.exit(main(["convert", *sys.argv[1:]]))
