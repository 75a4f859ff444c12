"""`python -m data_prep SOURCE OUTPUT`: the `prep` command."""

import sys

from data_prep.cli import main

if __name__ == "__main__":
    sys.exit(main())
