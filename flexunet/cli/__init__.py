"""The command line: options from settings, errors and signals to exit codes."""
