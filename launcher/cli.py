"""The entry point of `flexunet`: handles Ctrl-C and signals from its first line on.

The commands are in `launcher.commands`. Importing them takes a fraction of a second, or seconds
from a slow disk.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    try:
        from flexunet.cli.interrupts import quiet_interrupts

        with quiet_interrupts():
            from flexunet.cli.runner import run_command
            from launcher.commands.root import command

            return run_command(command, argv, "flexunet")
    except KeyboardInterrupt:
        print("flexunet: interrupted; the same command continues", file=sys.stderr)  # noqa: T201
        return 6


if __name__ == "__main__":
    raise SystemExit(main())
