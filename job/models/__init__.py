"""Builds networks and their layers."""
