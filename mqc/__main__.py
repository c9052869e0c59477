"""``python -m mqc``."""

import sys

from mqc.cli import main

if __name__ == "__main__":
    sys.exit(main())
