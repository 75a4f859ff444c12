"""Writes and opens exported models, one module for each format."""
