"""`python -m flashgau` is the `flashgau` command."""

import sys

from flashgau.cli import main

if __name__ == "__main__":
    sys.exit(main())
