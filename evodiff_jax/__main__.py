"""`python -m evodiff_jax`: the command line."""

import sys

from evodiff_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
