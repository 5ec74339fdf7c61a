"""``python -m chanzoo``: the same as the ``chanzoo`` command."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
