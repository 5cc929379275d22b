"""The `flashgau` command, also as `python -m flashgau`: all of it is in `flashgau.cli`, which an extra brings."""

import sys

from flashgau.extras import MissingExtra


def main() -> int:
    """Run the command line; return its exit status, 1 with one line if a package of the extra is not installed."""
    try:
        from flashgau.cli import main as run
    except MissingExtra as missing:
        print(f"flashgau: {missing}", file=sys.stderr)
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
