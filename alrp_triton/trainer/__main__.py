"""``python -m alrp_triton.trainer``, which is ``alrp-train``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
