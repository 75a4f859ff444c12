"""`python -m launcher COMMAND`: the commands of `flexunet launch`."""

import sys

from launcher.commands.launch import main

if __name__ == "__main__":
    sys.exit(main())
