"""Builds commands: options from settings, exit codes from errors and signals."""
