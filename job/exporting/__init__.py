"""Exports a trained run for programs that do not have this package."""
