"""`python -m data_prep.phantoms FOLDER`: draws synthetic mammograms."""

import sys

from data_prep.phantoms.images import main

if __name__ == "__main__":
    sys.exit(main())
