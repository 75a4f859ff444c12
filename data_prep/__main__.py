"""`python -m data_prep SOURCE OUTPUT`: the `prep` command."""

import sys

from data_prep.pipeline import main

if __name__ == "__main__":
    sys.exit(main())
