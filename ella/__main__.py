"""``python -m ella`` is the command ``ella``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
