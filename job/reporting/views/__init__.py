"""Collects what a page shows: tables, figures and plots, from the files that a run stored."""
