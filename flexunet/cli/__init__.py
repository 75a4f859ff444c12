"""The command line: options from settings, errors to exit codes, signals."""
