"""Runs the command `python -m data_prep.phantoms FOLDER`, which writes synthetic mammograms."""

import sys

from data_prep.phantoms.cli import main

if __name__ == "__main__":
    sys.exit(main())
