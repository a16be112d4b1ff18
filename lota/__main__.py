"""`python -m lota`: the command line."""

import sys

from lota.cli import main

if __name__ == "__main__":
    sys.exit(main())
