"""`python -m pgolf_fast.cli`, which torchrun needs."""

import sys

from pgolf_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
