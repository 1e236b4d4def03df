"""`python -m vqvit`: the command line."""

import sys

from vqvit.cli import main

if __name__ == "__main__":
    sys.exit(main())
